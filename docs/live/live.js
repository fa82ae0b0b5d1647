// The page: it draws what the worker's memory holds, and asks it for answers. See model.js for the model.
"use strict"
for (const page of document.querySelectorAll(".live")) start(page)

function start(page) {
  const find = selector => page.querySelector(selector)
  const settings = JSON.parse(find(".live-settings").textContent)
  const COLUMNS = 24, CELL = { x: 6, y: 8 }, GAP = 12, SECONDS = 2, FLIGHT = 0.35
  const picture = find(".live-picture"), layer = find(".live-layer"), form = find("form"), output = find("output")
  const memory = find(".live-memory"), file = find(".live-file"), range = find("[type=range]"), ribbon = find(".live-ribbon")
  const fields = { before: find("[name=before]"), after: find("[name=after]"), layer: find("[name=layer]") }
  const now = { before: "pig_latin", after: "reverse", word: "hotswap", step: 0, layer: 0, guessed: false, playing: 0 }
  const on = { damaged: false, request: false, padding: false, scaling: false, unpadded: false }
  let layers, names, ranks, ends = {}, held, files = {}, drawn = 0, asked = 0, ribboned = ""

  // --- the worker, made of the text of model.js, so that it also starts from a file on disk

  const source = new Blob([find(".live-model").textContent], { type: "text/javascript" })
  const worker = new Worker(URL.createObjectURL(source)), waiting = new Map()
  let calls = 0
  worker.onmessage = ({ data: { id, result, error } }) => {
    const [done, failed] = waiting.get(id)
    waiting.delete(id)
    error ? failed(new Error(error)) : done(result)
  }
  function call(what, given, moved = []) {
    return new Promise((done, failed) => {
      waiting.set(++calls, [done, failed])
      worker.postMessage({ id: calls, what, ...given }, moved)
    })
  }

  /** A file of the package: from the site, or from this page where it carries all of them. */
  async function read(name) {
    const inside = page.querySelector(`[data-file="${name}"]`)
    const address = inside ? `data:application/octet-stream;base64,${inside.textContent}` : settings.files + name
    const response = await fetch(address)
    if (!response.ok) throw new Error(`${name}: ${response.status}`)
    return response.arrayBuffer()
  }

  async function open() {
    const [base, ...others] = await Promise.all(["base", ...Object.keys(settings.adapters)].map(each => read(`${each}.safetensors`)))
    const adapters = Object.fromEntries(Object.entries(settings.adapters)
      .map(([name, config], at) => [name, { config, file: others[at] }]))
    const { config, vocabulary } = settings
    ;({ layers, ranks } = await call("open", { base, config, vocabulary, adapters }, [base, ...others]))
    names = Object.keys(adapters)
    page.querySelectorAll("[hidden]:not(.live-ribbon, .live-moved, .live-key)").forEach(each => { each.hidden = false })
    find(".live-wait").remove()
    fill()
    await choose()
    await swapTime()
  }

  // --- what is so

  const last = () => Math.max(...layers.map((_, at) => Math.max(ranks[now.before][at], ranks[now.after][at]))) + 1
  /** The row that is missing in a damaged file. */
  const missing = () => Math.max(1, Math.floor(Math.max(...ranks[now.after]) * 0.6))
  const end = () => on.damaged ? missing() : last()
  const isHalf = () => now.step > 0 && now.step < last() && !(on.damaged && now.step === end())
  const keeps = () => ({ padding: on.padding, scaling: on.scaling })
  const pair = () => ({ before: now.before, after: now.after })
  const isWord = text => /^[a-z]{1,10}$/.test(text)
  /** Whose an answer is; where both adapters answer alike, that of the one that is in memory. */
  const whose = (answer, step = now.step) =>
    (step ? ["after", "before", "base"] : ["before", "after", "base"]).find(each => ends[each] === answer) ?? "neither"
  const owner = answer => ({ before: `${now.before}’s answer`, after: `${now.after}’s answer`, base: "the base’s answer", neither: "neither adapter’s answer" })[whose(answer)]
  const still = matchMedia("(prefers-reduced-motion: reduce)")

  function fill() {
    for (const field of [fields.before, fields.after]) field.innerHTML = names.map(name => `<option>${name}</option>`).join("")
    fields.layer.innerHTML = layers.map(({ path }, at) =>
      `<option value="${at}">block ${path[0]}, ${path.split(".")[2]}</option>`).join("")
    const short = layers.slice(0, 7).map(({ path }) => path.split(".")[2].replace("_proj", ""))
    const blocks = Array.from({ length: layers.length / 7 }, (_, block) =>
      `<span>${block}</span>` + '<canvas width="32" height="32"></canvas>'.repeat(7))
    find(".live-tiles").innerHTML = ["block", ...short].map(each => `<span>${each}</span>`).join("") + blocks.join("")
    find(".live-tiles").setAttribute("role", "img")
    find(".live-tiles").setAttribute("aria-label", "a tile for each layer, with a line for each row in its adapter’s color")
    page.querySelectorAll(".live-tiles canvas").forEach((tile, at) => {
      tile.title = layers[at].path
      tile.addEventListener("click", () => show(at))
    })
  }

  /** Another pair or word: read the file's layer, and ask for the answers at both ends. */
  async function choose() {
    if (!now.chosen) {
      const both = layers.map((_, at) => ranks[now.after][at] * 100 + ranks[now.before][at])
      now.layer = both[14] === Math.max(...both) ? 14 : both.indexOf(Math.max(...both))
    }
    page.style.setProperty("--before", `var(--${now.before})`)
    page.style.setProperty("--after", `var(--${now.after})`)
    Object.entries(fields).forEach(([name, field]) => { field.value = now[name] })
    range.max = last()
    find(".live-letters").innerHTML = isWord(now.word) ? [...now.word, "&gt;"].map(letter => `<i>${letter}</i>`).join("") : ""
    const round = ++asked, { layer } = now
    const [one, two] = await Promise.all([now.before, now.after].map(name => call("file", { name, layer, columns: COLUMNS })))
    const found = isWord(now.word) && await Promise.all([
      call("answer", { ...pair(), step: 0, word: now.word }),
      call("answer", { ...pair(), step: last(), word: now.word }),
      call("answer", { word: now.word })])
    if (round !== asked) return
    files = { before: one, after: two }
    if (found) [ends.before, ends.after, ends.base] = found
    python()
    await update()
  }

  function show(at) {
    now.layer = at
    now.chosen = true
    return choose()
  }

  /** Write the step to memory, draw what it holds, and ask. */
  async function update() {
    now.step = Math.min(now.step, end())
    const round = ++drawn, { step, layer } = now
    const found = await call("stop", { ...pair(), step, keeps: keeps(), layer, columns: COLUMNS })
    if (round !== drawn) return
    held = found
    const moved = on.unpadded && step === last() && await call("unpadded", { ...pair(), layer, word: isWord(now.word) ? now.word : "a" })
    // without room, the old cells stay as they were
    if (moved && moved.before.rows !== moved.after.rows)
      held.cells = (await call("stop", { ...pair(), step: 0, layer, columns: COLUMNS })).cells
    draw(moved)
    controls()
    if (now.playing) return
    await say(round, moved)
    if (round === drawn) await Promise.all([lines(round), answers()])
  }

  async function say(round, moved) {
    const verdict = find(".live-whose")
    let kind = "neither", text = "", told = ""
    if (!isWord(now.word)) told = "It was trained on words of 1 to 10 small letters, a to z: ask one of those."
    else if (isHalf() && !now.guessed) [text, told] = ["?", "guess below"]
    else {
      text = moved ? moved.answer : await call("ask", { word: now.word })
      if (round !== drawn) return
      kind = whose(text)
      const isOver = now.step === end(), isRight = kind === "after" && now.step === last()
      told = (isRight ? "✓ " : isOver || kind === "neither" ? "✗ " : "") + owner(text)
    }
    output.textContent = text
    output.className = `is-${kind}`
    verdict.textContent = told
    verdict.className = `live-whose ${told[0] === "✗" ? "live-no" : told[0] === "✓" ? "live-yes" : ""}`
    page.dataset.ready = `${now.word} ${now.step}`
  }

  // --- drawing

  const probe = document.createElement("i")
  probe.style.display = "none"
  page.append(probe)
  function rgb(name) {
    probe.style.color = `var(--${name})`
    const brush = rgb.brush ??= new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true })
    brush.fillStyle = getComputedStyle(probe).color
    brush.fillRect(0, 0, 1, 1)
    return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3)
  }
  const mix = (from, to, share) => `rgb(${from.map((each, at) => Math.round(each + (to[at] - each) * share)).join()})`

  /** The 95th hundredth of a matrix' values, for which a cell has its adapter's full color. */
  function largest({ cells }, side) {
    const sizes = cells.flatMap(row => row[side].map(Math.abs)).sort((one, other) => one - other)
    return sizes[Math.floor(sizes.length * 0.95)] || 1
  }

  function paint(canvas, rows, owners, colors) {
    const scale = Math.max(devicePixelRatio, 1), width = 2 * COLUMNS * CELL.x + GAP, height = Math.max(rows.length, 1) * CELL.y
    Object.assign(canvas, { width: width * scale, height: height * scale })
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` })
    const brush = canvas.getContext("2d")
    brush.scale(scale, scale)
    rows.forEach((row, at) => row.forEach((values, side) => values.forEach((value, column) => {
      const x = side * (COLUMNS * CELL.x + GAP) + column * CELL.x, y = at * CELL.y
      if (owners[at]) {
        const share = Math.min(1, Math.abs(value) / largest.of[owners[at]][side])
        brush.fillStyle = mix(colors.cell, colors[owners[at]], 0.12 + 0.88 * share)
        brush.fillRect(x, y, CELL.x - 1, CELL.y - 1)
      } else {
        brush.fillStyle = mix(colors.cell, colors.muted, 0.8)
        brush.fillRect(x + 2, y + 3, 1.5, 1.5)
      }
    })))
  }

  function draw(moved) {
    const colors = Object.fromEntries(["before", "after", "cell", "muted"].map(name => [name, rgb(name)]))
    const written = Math.min(now.step, last() - 1), isOver = now.step === last()
    const ownerOf = (row, rank, isZero) => isZero ? "" : row < written && row < rank ? "after" : "before"
    largest.of = Object.fromEntries(Object.entries(files).map(([name, each]) => [name, [largest(each, 0), largest(each, 1)]]))
    const isMoved = moved && moved.before.rows !== moved.after.rows
    const owners = held.cells.map((row, at) =>
      isMoved ? "before" : ownerOf(at, ranks[now.after][now.layer], !row.flat().some(Boolean)))
    paint(memory.querySelector("canvas"), held.cells, owners, colors)
    const shown = on.damaged ? files.after.cells.slice(0, missing()) : files.after.cells
    paint(file.querySelector("canvas"), shown, shown.map(() => "after"), colors)
    page.querySelectorAll(".live-tiles canvas").forEach((tile, at) => {
      const brush = tile.getContext("2d"), sizes = held.sizes[at], most = Math.max(...sizes), high = 32 / sizes.length
      brush.clearRect(0, 0, 32, 32)
      sizes.forEach((size, row) => {
        const whose = ownerOf(row, ranks[now.after][at], !size)
        if (!whose && row % Math.max(1, 4 / high) === 0) {
          brush.fillStyle = mix(colors.cell, colors.muted, 0.8)
          for (let x = 1; x < 32; x += 4) brush.fillRect(x, row * high + high / 2 - 0.5, 1, 1)
        }
        if (!whose) return
        brush.fillStyle = mix(colors.cell, colors[whose], 0.35 + 0.65 * (size / most))
        brush.fillRect(0, row * high, 32, high)
      })
      tile.classList.toggle("live-here", at === now.layer)
    })
    const rows = held.cells.length, { inputs, outputs } = layers[now.layer]
    const bar = direction => {
      const stops = [], shown = isMoved ? ["after"] : owners, edge = 100 / shown.length
      shown.forEach((whose, at) => stops.push(`var(--${whose || "cell"}) ${at * edge}% ${(at + 1) * edge}%`))
      return `linear-gradient(to ${direction}, ${stops.join()})`
    }
    page.style.setProperty("--wide", `${Math.round((68 * (isMoved ? moved.after.rows : rows)) / 128)}px`)
    find(".live-a").style.background = bar("bottom")
    find(".live-b").style.background = bar("right")
    const scalingOwner = isOver && !on.scaling ? "after" : "before"
    find(".live-s").style.background = `var(--${scalingOwner})`
    const said = isMoved ? [now.before] : isOver && !on.scaling && !on.padding ? [now.after] : now.step === 0 ? [now.before] : [now.before, `and ${now.after}`]
    memory.style.setProperty("--own", said[1] ? "var(--ink)" : `var(--${said[0]})`)
    memory.querySelector("figcaption b").textContent = isMoved ? `${now.before}, left behind` : said.join(" ")
    file.style.setProperty("--own", `var(--${now.after})`)
    file.querySelector("figcaption b").textContent = now.after + (on.damaged ? ", damaged" : "")
    for (const [figure, rows] of [[memory, held.cells.length], [file, shown.length]])
      figure.querySelector(".live-cells span:last-child").textContent = rows ? `row ${rows - 1}` : "no rows for this layer"
    for (const [figure, name, all] of [[memory, "in memory", owners], [file, "in the file", shown.map(() => "after")]]) {
      const count = kind => all.filter(each => each === kind).length
      const canvas = figure.querySelector("canvas")
      canvas.setAttribute("role", "img")
      canvas.setAttribute("aria-label", `${name}, rows of A and B: ${count("after")} of ${now.after}, ${count("before")} of ${now.before}, ${count("")} of zeros`)
    }
    memory.querySelector(".live-scaling b").style.background = `var(--${isMoved ? "before" : scalingOwner})`
    memory.querySelector(".live-scaling b").textContent = (isMoved ? moved.before : held).scaling.toFixed(2)
    file.querySelector(".live-scaling b").textContent = files.after.scaling.toFixed(2)
    const [a, b] = [[rows, inputs], [outputs, rows]], hex = address => `0x${address.toString(16).padStart(6, "0")}`
    find(".live-address").textContent = hex(held.address)
    const guards = [["A", a], ["B", b]].map(([name, shape]) => {
      const real = moved ? shape.map(size => size === rows ? moved.before.rows : size) : shape
      const given = moved && shape.map(size => size === rows ? moved.after.rows : size)
      return moved && given.join() !== real.join() ? [false, `${name} float32 [${given.join(", ")}], not [${real.join(", ")}]`] : [true, `${name} float32 [${real.join(", ")}]`]
    })
    const number = value => Number(value.toFixed(3))
    guards.push(!on.unpadded ? [true, "s float64 [1, 1]"] : moved && moved.before.scaling !== moved.after.scaling
      ? [false, `s == ${number(moved.after.scaling)}, not ${number(moved.before.scaling)}`]
      : [true, `s == ${number(moved ? moved.before.scaling : held.scaling)}`])
    const failed = guards.some(([holds]) => !holds)
    find(".live-code ul").innerHTML = guards.map(([holds, text]) => `<li class="${holds ? "" : "live-no"}">${holds ? "✓" : "✗"} ${text}</li>`).join("") +
      (failed ? '<li class="live-no"><b>compiles again</b></li>' : "")
    const box = find(".live-moved")
    box.hidden = !isMoved
    memory.classList.toggle("live-gone", !box.hidden)
    if (!box.hidden) {
      box.querySelector("code").textContent = `${now.after}: ${hex(moved.after.address)}, s ${moved.after.scaling.toFixed(2)}`
      paint(box.querySelector("canvas"), files.after.cells, files.after.cells.map(() => "after"), colors)
    }
    connect()
  }

  /** The lines from the tile to the layer, and from compiled code to the first cell. */
  function connect() {
    const frame = layer.getBoundingClientRect(), of = element => {
      const box = element.getBoundingClientRect()
      return { left: box.left - frame.left, right: box.right - frame.left, top: box.top - frame.top, bottom: box.bottom - frame.top }
    }
    const tile = of(find(".live-here")), code = of(find(".live-code")), cells = of(memory.querySelector("canvas"))
    find(".live-leads").setAttribute("d", `M${tile.left - 2} ${tile.bottom + 4}L0 4H${frame.width}L${tile.right + 2} ${tile.bottom + 4}`)
    const isBeside = code.right < cells.left, x = isBeside ? cells.left - 14 : -8, from = isBeside ? code.right : code.left
    const y = cells.top + 4, tip = cells.left - 3
    find(".live-arrow").setAttribute("d", `M${isBeside ? Math.min(code.right, x) : code.left} ${code.top + 10}H${x}V${y}H${tip}m-6 -4l6 4l-6 4`)
  }

  function controls() {
    const at = now.step, rows = last() - 1
    range.value = at
    const count = `${at} of ${rows} rows are written`, own = Math.max(...ranks[now.after])
    const over = `${on.padding ? Math.min(own, rows) : rows} rows${on.scaling ? " are written, but not s" : " and s are written"}`
    const text = at === last() ? over : on.damaged && at === end() ? `${count}, then the file ends` : `${count}, then s`
    range.setAttribute("aria-valuetext", text)
    find(".live-step").textContent = text
    find(".live-swap").textContent = now.playing ? "Stop" : at === 0 ? "Swap" : at < end() ? "Go on" : Object.values(on).some(Boolean) ? "Again" : "Swap back"
    page.querySelectorAll(".live-switches button").forEach(button => button.setAttribute("aria-pressed", on[button.value]))
    if (now.playing) output.textContent = "…", find(".live-whose").textContent = "", output.className = "is-neither"
    guess()
  }

  // --- the swap in slow motion

  function play() {
    if (now.step < end()) return fly()
    if (!Object.values(on).some(Boolean)) [now.before, now.after] = [now.after, now.before]
    now.step = 0
    const me = (now.playing = performance.now())  // so that another click, before the files are read, stops it
    return choose().then(() => now.playing === me && fly())
  }

  function fly() {
    if (still.matches) return go(end())
    const begun = performance.now() - (now.step / last()) * SECONDS * 1000, me = (now.playing = begun)
    const canvas = find(".live-flight"), brush = canvas.getContext("2d"), background = mix(rgb("card"), [0, 0, 0], 0)
    const frame = time => {
      const bounds = layer.getBoundingClientRect(), scale = Math.max(devicePixelRatio, 1)
      Object.assign(canvas, { width: bounds.width * scale, height: bounds.height * scale })
      if (now.playing !== me) return
      brush.scale(scale, scale)
      const seconds = (time - begun) / 1000, each = (SECONDS - FLIGHT) / (last() - 1)
      const from = file.querySelector("canvas"), to = memory.querySelector("canvas")
      const [one, two] = [from, to].map(each => each.getBoundingClientRect())
      for (let row = now.step; row < Math.min(files.after.cells.length, end()); row++) {
        const share = (seconds - row * each) / FLIGHT, eased = share * share * (3 - 2 * share)
        if (share < 0 || share > 1) continue
        const x = one.left + (two.left - one.left) * eased - bounds.left, y = (one.top + (two.top - one.top) * eased) - bounds.top + row * CELL.y
        brush.fillStyle = background
        brush.fillRect(x, y, one.width, CELL.y)
        brush.drawImage(from, 0, row * CELL.y * scale, from.width, CELL.y * scale, x, y, one.width, CELL.y)
      }
      const step = Math.min(end(), Math.max(now.step, Math.floor((seconds - FLIGHT) / each) + 1))
      if (step !== now.step) {
        now.step = step
        if (step === end()) now.playing = 0
        update()
      }
      requestAnimationFrame(frame)
    }
    update()
    requestAnimationFrame(frame)
  }

  function go(step) {
    now.playing = 0
    now.step = step
    return update()
  }

  // --- stopped halfway

  const stopped = () => isHalf() ? now.step : Math.min(4, last() - 1)
  function guess() {
    const box = find(".live-guess"), at = stopped()
    box.querySelector("legend").textContent = now.guessed ? "Stopped halfway" : `Stop it halfway: after ${at} of ${last() - 1} rows, what does it answer?`
    const options = [...new Set([ends.before, ends.after, ends.base]), "something else"]
    box.querySelector("div").hidden = now.guessed
    if (!now.guessed) box.querySelector("div").innerHTML = options.map(each => `<button type="button">${each}</button>`).join("")
  }
  find(".live-guess div").addEventListener("click", async ({ target }) => {
    if (!target.matches("button")) return
    const at = stopped(), said = target.textContent
    const real = await call("answer", { ...pair(), step: at, keeps: {}, word: now.word })
    const isRight = real === said || (said === "something else" && whose(real) === "neither")
    now.guessed = true
    find(".live-guess p").textContent = `${isRight ? "Right" : "No"}: ${real}. ${whose(real) === "neither" ? "No error is raised, and no adapter answers so." : `That is ${owner(real)}.`} With hotswap_lab, requests inside of using or in_use wait until the last row is in.`
    await go(at)
    range.focus({ preventScroll: true })
  })

  /** The ribbon: the answer at each step, computed now. */
  async function answers() {
    const key = find(".live-steps .live-key")
    if (!now.guessed || !isWord(now.word)) {
      ribbon.hidden = key.hidden = true
      ribboned = ""
      return
    }
    const mine = `${now.before} ${now.after} ${now.word}`
    if (ribboned !== mine) {
      ribboned = mine
      ribbon.hidden = key.hidden = false
      ribbon.innerHTML = "<i></i>".repeat(last() + 1)
      const told = { before: `${now.before}’s`, after: `${now.after}’s`, base: "the base’s", neither: "nobody’s" }
      key.innerHTML = "whose answer, after each row: " +
        Object.entries(told).map(([kind, text]) => `<span><i class="is-${kind}"></i>${text}</span>`).join(" ")
      const counts = {}
      for (let step = 0; step <= last(); step++) {
        const text = await call("answer", { ...pair(), step, keeps: {}, word: now.word })
        if (ribboned !== mine) return
        const kind = whose(text, step), cell = ribbon.children[step]
        cell.className = `is-${kind}`
        cell.title = text
        counts[kind] = (counts[kind] ?? 0) + 1
      }
      ribbon.setAttribute("aria-label", `answers at each step: ${Object.entries(counts).map(([kind, count]) => `${count} ${told[kind]}`).join(", ")}`)
    }
  }
  // --- switches: each says the wrong answer that it makes, and what the library does

  async function lines(round) {
    const list = find(".live-switches ul"), found = []
    let other = ""
    if (isWord(now.word)) {
      const answer = (step, keeps = {}) => call("answer", { ...pair(), step, keeps, word: now.word })
      const code = text => `<code>${text}</code>`
      const wrong = text => `<span class="live-no">✗ ${text}</span>`, ours = text => `<span class="live-yes">✓ hotswap_lab ${text}</span>`
      const say = (text, right, why, less, does) => found.push(
        `<li>${text === right ? `${code(text)}: ${less}` : wrong(`${code(text)}: ${why}`)}<br>${ours(`${does}: ${code(right)}`)}</li>`)
      const { before, after } = ends, at = stopped()
      if (on.damaged) say(await answer(missing()), before, "a loop wrote until a row was missing.", "this word doesn’t show what a loop wrote.", "reads the whole file first, and writes nothing")
      if (on.request) other = `a request after ${at} rows got ${await answer(at)}`
      if (on.request) say(await answer(at), after, `the request read memory after ${at} rows.`, "this word doesn’t show where the swap was.", "lets a request inside of using or in_use wait for the last row and s")
      if (on.padding) say(await answer(last(), { padding: true }), after, `${now.before}’s last rows still add to B (A x).`, "no row was left that counts; try pig_latin → reverse.", "writes zeros behind the last row")
      if (on.scaling) say(await answer(last(), { scaling: true }), after, `${now.after}’s rows, times ${now.before}’s s.`, "for this word, the old s will do.", "writes s in the same swap")
      if (on.unpadded) found.push(`<li>${find(".live-code .live-no") ? wrong("The cells are at another address, and the guards on it fail: the code compiles again.") : "Run the swap: do shape and s stay the same?"}<br>${ours("makes room for the highest rank once; then no guard fails.")}</li>`)
    }
    if (round !== drawn) return
    list.innerHTML = found.join("")
    find(".live-other").textContent = other
  }

  page.querySelectorAll(".live-switches button").forEach(button => button.addEventListener("click", () => {
    on[button.value] = !on[button.value]
    now.playing = 0
    if (!on[button.value]) return update()
    now.step = 0
    play()
  }))

  // --- the rest

  async function swapTime() {
    const times = 2000, mean = await call("time", { ...pair(), times })
    find(".live-time").textContent = `Slow motion: at full speed, this page swaps from memory in ${mean < 0.1 ? mean.toFixed(3) : mean.toFixed(2)} ms (mean of ${times.toLocaleString("en")}).`
  }
  function python() {
    const code = find(".live-python code")
    code.textContent = settings.python.replaceAll("{before}", now.before).replaceAll("{after}", now.after)
      .replaceAll("{word}", isWord(now.word) ? now.word : "hotswap").replace("{one}", ends.before).replace("{two}", ends.after)
  }

  form.addEventListener("submit", event => event.preventDefault())
  form.word.addEventListener("input", () => {
    now.word = form.word.value.trim()
    choose()
  })
  for (const name of ["before", "after"]) fields[name].addEventListener("change", async () => {
    const other = name === "before" ? "after" : "before"
    if (fields[name].value === now[other]) now[other] = now[name]
    Object.assign(now, { [name]: fields[name].value, step: 0, playing: 0, chosen: false })
    await choose()
    await swapTime()
  })
  fields.layer.addEventListener("change", () => show(+fields.layer.value))
  range.addEventListener("input", () => go(+range.value))
  ribbon.addEventListener("click", ({ target }) => ribbon.contains(target) && target !== ribbon && go([...ribbon.children].indexOf(target)))
  find(".live-swap").addEventListener("click", () => now.playing ? go(now.step) : play())
  const redraw = () => held && update()
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw)
  new MutationObserver(redraw).observe(document.body, { attributeFilter: ["data-theme"] })
  new ResizeObserver(() => held && connect()).observe(picture)

  find(".live-app").hidden = false
  open().catch(error => {
    find(".live-wait").textContent = location.protocol === "file:" ? settings.fromDisk : `The model’s files can’t be read: ${error.message}`
  })
}
