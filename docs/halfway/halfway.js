// Stops a swap where the reader wants. The embedded model answered beforehand, after each step: see make.py.
for (const page of document.querySelectorAll(".halfway")) {
  const { words, layers, adapters, base, pairs, damage, measured, sizes, TEXTS, CODE, OPENS, COLORS } =
    JSON.parse(page.querySelector("script").textContent)
  const find = selector => page.querySelector(selector)
  const all = selector => [...page.querySelectorAll(selector)]
  const form = find("form").elements, line = find(".halfway-line"), bars = find(".halfway-bars")
  const ribbon = find(".halfway-ribbon"), options = find(".halfway-guess div"), feedback = find(".halfway-guess p")
  const room = bars.children.length - 1  // the last bar is the scaling
  const fill = (text, values) => text.replace(/{(\w+)}/g, (_, key) => values[key])
  let step = OPENS, revealed = false

  // What is so after this step: the values that texts and code are filled with, and whose each answer and bar is.
  function state() {
    const pair = pairs[form.pair.value], order = form.order.value, at = words.indexOf(form.word.value)
    const steps = pair[order].map(answers => answers[at]), last = steps.length - 1
    const [old, fresh] = [adapters[pair.before], adapters[pair.after]]
    const owners = { [base[at]]: "base", [fresh.answers[at]]: "after", [old.answers[at]]: "before" }
    const whose = text => owners[text] ?? "neither", kind = whose(steps[step])
    const values = {
      before: pair.before, after: pair.after, old: old.answers[at], new: fresh.answers[at], word: words[at], step, last,
      answer: steps[step], ...measured.waits[form.pair.value], shape: sizes.shape.join(" × "),
      times: sizes.weight / sizes.rows, layers: layers.length, changed: damage.loop.changed, all: damage.all,
      loop: damage.loop.answers[at], refused: damage.refused.answers[at],
    }
    const verdict = step === 0 ? "start" : step === last ? "end" : { before: "old", after: "new" }[kind] ?? kind
    values.how = fill(TEXTS[`gets_${step === last ? "end" : kind in { before: 0, after: 0 } ? kind : "neither"}`], values)
    const row = (at, rank, other) => at < step ? (at < other ? "after" : "room done") : at < rank ? "before" : "room"
    const each = order === "rows"
      ? [...Array(room).keys()].map(at => row(at, old.ranks[0], fresh.ranks[0])).concat(step > room ? "after" : "before")
      : layers.map((_, at) => row(at, old.ranks[at] && layers.length, fresh.ranks[at] && layers.length))
    const own = Object.fromEntries([["before", old], ["after", fresh]].map(([name, { ranks }]) =>
      [name, order === "rows" ? ranks[0] : ranks.filter(rank => rank).length]))
    return { values, own, order, steps, whose, kind, each, verdict: fill(TEXTS[verdict], values) }
  }

  const cells = names => names.map(name => `<i class="${name}"></i>`).join("")

  function draw() {
    const { values, own, order, steps, whose, kind, each, verdict } = state()
    const count = name => (order === "rows" ? each.slice(0, room) : each).filter(one => one === name).length
    for (const name of ["before", "after"]) page.style.setProperty(`--${name}`, COLORS[values[name]])
    bars.innerHTML = cells(each)
    bars.classList.toggle("halfway-layers", order === "layers")
    line.style.setProperty("--at", step / each.length)
    line.setAttribute("aria-valuemax", values.last)
    line.setAttribute("aria-valuenow", step)
    line.setAttribute("aria-valuetext", revealed ? `${values.answer}. ${verdict}` : fill(TEXTS.hidden, values))
    ribbon.innerHTML = cells(steps.map((text, at) => (revealed ? whose(text) : "") + (at === step ? " here" : "")))
    find(".halfway-answer").textContent = revealed ? values.answer : "?"
    find(".halfway-answer").className = `halfway-answer ${revealed ? kind : ""} ${values.answer.length > 18 ? "halfway-long" : ""}`
    values.short = values.answer.length > 18 ? `${values.answer.slice(0, 17)}…` : values.answer
    const texts = { ...values, verdict: revealed ? verdict : fill(TEXTS.hidden, values) }
    for (const kind of ["after", "before"])
      texts[`count_${kind}`] = fill(TEXTS[`bar_${order}`], { rows: count(kind), own: own[kind], name: values[kind] })
    Object.assign(values, { kept: count("room"), written: count("room done") })
    for (const what of ["none", "reload", "using", "loop", "refused"]) texts[what] = fill(TEXTS[what], values)
    if (step === values.last) texts.using = fill(TEXTS.using_end, values)
    for (const what of ["caption", "base", "room", "scaling"]) texts[what] = fill(TEXTS[`${what}_${order}`], values)
    for (const element of all("[data-say]")) element.textContent = texts[element.dataset.say]
    for (const pre of all("pre")) pre.textContent = fill(CODE[pre.dataset.code === "step" ? order : pre.dataset.code], values)
    const longest = Math.max(...measured.waits.map(each => each.reload))
    for (const what of ["reload", "using"]) find(`[data-bar=${what}]`).style.setProperty("--ms", values[what] / longest)
    for (const button of options.children) button.disabled = revealed
    if (!revealed) {
      const words = new Set([values.old, values.new, values.answer, TEXTS.error])
      options.innerHTML = [...words].map(word => `<button type="button">${word}</button>`).join("")
    }
  }

  function reveal(text) {
    revealed = true
    feedback.textContent ||= text
  }

  function move(to) {
    const next = Math.min(Math.max(to, 0), state().values.last)
    if (next !== step) {
      step = next
      reveal(TEXTS.moved)
    }
    draw()
  }

  // the line, by pointer and by keyboard
  function dragged(element, where) {
    element.addEventListener("pointerdown", event => {
      element.setPointerCapture(event.pointerId)
      event.preventDefault()
      line.focus({ preventScroll: true })
      move(where(event))
    })
    element.addEventListener("pointermove", event => element.hasPointerCapture(event.pointerId) && move(where(event)))
  }
  function row({ clientY }) {
    const { top, height } = bars.getBoundingClientRect()
    return Math.round(((clientY - top) / height) * state().values.last)
  }
  dragged(bars, row)
  dragged(line, row)
  dragged(ribbon, ({ clientX }) => {
    const { left, width } = ribbon.getBoundingClientRect()
    return Math.floor(((clientX - left) / width) * (state().values.last + 1))
  })
  line.addEventListener("keydown", event => {
    const by = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1, PageDown: 5, PageUp: -5, Home: -99, End: 99 }[event.key]
    if (!by) return
    event.preventDefault()
    move(step + by)
  })

  find("form").addEventListener("input", ({ target }) => {
    feedback.textContent = ""
    if (target.name === "order") step = Math.min(step, state().values.last)
    else {  // another swap or word: a new guess
      [step, revealed] = [OPENS, false]
      find("[value=none]").setAttribute("aria-pressed", false)
    }
    draw()
    const { values, verdict } = state()
    find(".halfway-says").textContent = revealed ? `${values.answer}. ${verdict}` : fill(TEXTS.hidden, values)
  })

  options.addEventListener("click", ({ target }) => {
    if (!target.matches("button")) return
    const { values, kind } = state(), text = kind in { base: 0, neither: 0 } ? "neither" : "adapter"
    reveal(fill(TEXTS[target.textContent === values.answer ? "right" : "guessed"], { ...values, guess: target.textContent }) + TEXTS[`is_${text}`])
    target.classList.add("halfway-no")
    for (const each of options.children) if (each.textContent === values.answer) each.className = "halfway-yes"
    draw()
    line.focus({ preventScroll: true })
  })

  // a button shows what it does, and the code below it
  for (const button of all(".halfway-tries button")) {
    button.disabled = false
    button.setAttribute("aria-pressed", false)
    button.classList.toggle("halfway-last", button.matches(":first-child"))
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", true)
      for (const each of button.parentElement.children) each.classList.toggle("halfway-last", each === button)
      const code = button.parentElement.nextElementSibling
      code.querySelector("pre").dataset.code = button.value
      code.querySelector("b").textContent = button.textContent
      if (button.value === "none") reveal(TEXTS.asked)
      draw()
      find(".halfway-says").textContent = button.nextElementSibling.innerText
    })
  }
  for (const button of all("details button"))
    button.addEventListener("click", async () => {
      const pre = button.parentElement.querySelector("pre")
      getSelection().selectAllChildren(pre)
      await navigator.clipboard?.writeText(pre.textContent).catch(() => {})
      find(".halfway-says").textContent = button.textContent = "copied"
      setTimeout(() => { button.textContent = "copy" }, 2000)
    })

  page.classList.add("halfway-on")
  draw()
}
