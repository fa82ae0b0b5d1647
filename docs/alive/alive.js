// Shows what the embedded model answered, without a kernel: make.py computed all of it beforehand.
for (const page of document.querySelectorAll(".alive")) {
  const { words, strengths, layers, adapters, measured, LEVELS, PER_ROOT, STEPS, CALL } =
    JSON.parse(page.querySelector("script").textContent)
  const find = selector => page.querySelector(selector)
  const form = find("form").elements
  const tiles = [...page.querySelectorAll("canvas")]

  // One pixel for each part of the weight: over the base's gray, the more opaque the more the adapter adds there, in
  // the steps of the widgets' map.
  function paint(canvas, levels, strength) {
    const brush = canvas.getContext("2d"), { width, height } = canvas
    brush.clearRect(0, 0, width, height)
    brush.fillStyle = getComputedStyle(canvas).color
    let squares = 0
    for (let at = 0; at < levels.length; at++) {
      const root = (LEVELS.indexOf(levels[at]) / PER_ROOT) * Math.sqrt(strength)
      squares += root ** 4 / levels.length
      const passed = STEPS.filter(end => root ** 2 > end).length
      brush.globalAlpha = root && (passed + 1) / (STEPS.length + 1)
      brush.fillRect(at % width, Math.floor(at / width), 1, 1)
    }
    return Math.sqrt(squares)
  }

  function draw() {
    const name = form.adapter.value, strength = Number(form.strength.value)
    page.style.setProperty("--adapter", find(":checked").parentElement.style.getPropertyValue("--adapter"))
    let count = 0
    layers.forEach((path, at) => {
      const levels = strength ? adapters[name].tiles[path] ?? "" : ""
      const size = paint(tiles[at], levels, strength)
      count += levels !== ""
      tiles[at].title = `${path}: ${levels ? `adds ${size.toFixed(2)} × the weight's own size` : "the base model alone"}`
    })
    const text = strength ? `${name} is in ${count} of ${layers.length} layers` : "the adapter is off"
    find("figcaption").textContent = text
    find(".alive-map").setAttribute("aria-label", `Map of the model's weights: ${text}`)
  }

  function answer() {
    const name = form.adapter.value, strength = Number(form.strength.value), word = form.word.value
    find(".alive-answer").classList.toggle("alive-off", !strength)
    find(".alive-answer span").textContent = `${word} →`
    find(".alive-answer output").textContent = adapters[name].answers[strengths.indexOf(strength)][words.indexOf(word)]
    const call = CALL.replace("{name}", name).replace("{strength}", strength)
    find("pre").textContent = `${call}\ndemo.ask(model, tokenizer, "${word}")`
    const says = { 0: "0: off", 1: "1: as trained" }[strength] ?? String(strength)
    form.says.value = says
    form.strength.setAttribute("aria-valuetext", says)
  }

  function time(what) {
    const name = form.adapter.value, at = strengths.indexOf(Number(form.strength.value))
    const [swap, strength, reload] = [measured.swap[name][at], measured.strength[name][at], measured.reload[name][0]]
    find(".alive-time").textContent = {
      adapter: `The real swap took ${swap} ms. A reload by PEFT takes ${reload} ms, ${Math.round(reload / swap)} times as long.`,
      strength: `The real change of strength took ${strength} ms.`,
      word: "No swap: the same model, another word.",
    }[what]
  }

  find("form").addEventListener("input", event => {
    draw()
    answer()
    time(event.target.name)
  })
  draw()
  answer()
  time("adapter")
  // the theme's colors, which a canvas does not follow
  new MutationObserver(draw).observe(document.body, { attributeFilter: ["data-theme"] })
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw)
}
