// The demo's model in plain JavaScript: a small Llama, its LoRA adapters, and the memory that a swap overwrites.
//
// It reads the files that the package ships. The adapter's memory has the layout of hotswap_lab/core/arena.py: row j of
// a band holds rank component j of every layer, row j of each A and column j of each B. tests/browser/test_live.py
// compares memory, logits and answers with PyTorch. In a Web Worker, this file answers the page's messages (at the end).
"use strict"

// --- files

/** The tensors of a safetensors file as float32: a header in JSON, then the numbers. */
function readTensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true))
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)))
  delete header.__metadata__
  const read = ([name, { dtype, shape, data_offsets: [start, end] }]) => {
    const from = 8 + length + start  // the header's length is a multiple of 8
    if (dtype === "F32") return [name, { shape, data: new Float32Array(buffer, from, (end - start) / 4) }]
    if (dtype !== "BF16") throw new Error(`${name} is ${dtype}: this page reads F32 and BF16`)
    // a bfloat16 is the upper half of a float32
    const halves = new Uint16Array(buffer, from, (end - start) / 2)
    return [name, { shape, data: new Float32Array(Uint32Array.from(halves, half => half << 16).buffer) }]
  }
  return Object.fromEntries(Object.entries(header).map(read))
}

/** An adapter by layer: A of shape (rank, in), B of shape (out, rank), and the scaling, which its config gives. */
function readAdapter(buffer, config) {
  const tensors = readTensors(buffer), adapter = {}
  for (const [key, a] of Object.entries(tensors)) {
    const path = /^base_model\.model\.model\.layers\.(.+)\.lora_A\.weight$/.exec(key)?.[1]
    if (!path) continue
    const rank = a.shape[0], b = tensors[key.replace("lora_A", "lora_B")]
    const named = Object.entries(config.alpha_pattern ?? {})
      .find(([pattern]) => new RegExp(`^(.*\\.)?(${pattern})$`).test(`model.layers.${path}`))
    const scaling = (named ? named[1] : config.lora_alpha) / (config.use_rslora ? Math.sqrt(rank) : rank)
    adapter[path] = { a: a.data, b: b.data, inputs: a.shape[1], outputs: b.shape[0], rank, scaling }
  }
  return adapter
}

// --- memory

/** All layers that can have an adapter, in the order in which the library lays them out. */
function layersOf({ hidden_size: hidden, intermediate_size: wide, num_hidden_layers: blocks, ...config }) {
  const heads = config.num_attention_heads * config.head_dim, shared = config.num_key_value_heads * config.head_dim
  const sizes = { "self_attn.q_proj": [hidden, heads], "self_attn.k_proj": [hidden, shared],
    "self_attn.v_proj": [hidden, shared], "self_attn.o_proj": [heads, hidden], "mlp.gate_proj": [hidden, wide],
    "mlp.up_proj": [hidden, wide], "mlp.down_proj": [wide, hidden] }
  return Array.from({ length: blocks }, (_, block) => Object.entries(sizes)
    .map(([name, [inputs, outputs]]) => ({ path: `${block}.${name}`, inputs, outputs }))).flat()
}

/** Where each layer's A and B are: bands of layers with the same room, 64 bytes aligned, an odd number of lines wide. */
class Layout {
  constructor(layers, room) {
    const line = 16, up = size => Math.ceil(size / line) * line
    this.layers = layers
    this.bands = [...new Set(layers.map(({ path }) => room[path]))].sort((one, other) => other - one).filter(Boolean)
      .map(rows => ({ rows, pitch: 0 }))
    this.spans = layers.map(({ path, inputs, outputs }, index) => {
      const band = this.bands.find(({ rows }) => rows === room[path])
      if (!band) return null
      const span = { index, path, inputs, outputs, band, a: band.pitch, b: band.pitch + up(inputs) }
      band.pitch += up(inputs) + up(outputs)
      return span
    })
    let start = 0
    for (const band of this.bands) {
      if ((band.pitch / line) % 2 === 0) band.pitch += line
      band.start = start
      start += band.rows * band.pitch
    }
    this.size = start
  }

  /** An adapter as it is in memory: the rows of each band that it uses, and a scaling for each layer, 0 where it is off. */
  pack(adapter) {
    const ranks = band => this.spans.filter(span => span?.band === band).map(({ path }) => adapter[path]?.rank ?? 0)
    const rows = this.bands.map(band => Math.max(0, ...ranks(band)))
    const bands = this.bands.map((band, at) => new Float32Array(rows[at] * band.pitch))
    for (const { path, band, a, b } of this.spans.filter(span => span && adapter[span.path])) {
      const own = adapter[path], target = bands[this.bands.indexOf(band)]
      for (let row = 0; row < own.rank; row++) {
        target.set(own.a.subarray(row * own.inputs, (row + 1) * own.inputs), row * band.pitch + a)
        for (let out = 0; out < own.outputs; out++) target[row * band.pitch + b + out] = own.b[out * own.rank + row]
      }
    }
    return { rows, bands, scalings: this.layers.map(({ path }) => adapter[path]?.scaling ?? 0) }
  }
}

/** The memory of the adapter in the model. Its address never changes: whoever computes reads what is in it. */
class Memory {
  constructor(layout, heap = new ArrayBuffer(layout.size * 4 + layout.layers.length * 8), address = 0) {
    this.layout = layout
    this.address = address
    this.numbers = new Float32Array(heap, address, layout.size)
    this.scalings = new Float64Array(heap, address + layout.size * 4, layout.layers.length)
  }

  /** Write row `row` of all layers: the adapter's own, or zeros where only the former one had a row. */
  writeRow(row, packed, before, clears = true) {
    this.layout.bands.forEach(({ start, pitch, rows }, at) => {
      const target = start + row * pitch
      if (row < packed.rows[at]) this.numbers.set(packed.bands[at].subarray(row * pitch, (row + 1) * pitch), target)
      else if (clears && row < Math.min(before.rows[at], rows)) this.numbers.fill(0, target, target + pitch)
    })
  }

  /** A whole swap, as the library does one: a copy for each band, zeros behind it, and the scalings. */
  swap(packed, before, strength = 1) {
    this.layout.bands.forEach(({ start, pitch, rows }, at) => {
      this.numbers.set(packed.bands[at], start)
      const [from, to] = [packed.rows[at], before ? before.rows[at] : rows]
      if (from < to) this.numbers.fill(0, start + from * pitch, start + to * pitch)
    })
    packed.scalings.forEach((scaling, at) => { this.scalings[at] = scaling * strength })
  }

  /** The swap from `before` to `after`, stopped after so many steps. `keeps` names what a careless swap leaves out. */
  stop(before, after, step, keeps = {}) {
    this.swap(before)
    const last = stepsOf(before, after)
    for (let row = 0; row < Math.min(step, last - 1); row++) this.writeRow(row, after, before, !keeps.padding)
    if (step >= last && !keeps.scaling) this.scalings.set(after.scalings)
  }
}

/** How many steps a swap has: one for each row that either adapter uses, and one for the scalings. */
function stepsOf(before, after) {
  return Math.max(...before.rows, ...after.rows) + 1
}

// --- the model

/** out = W x; every matrix here has a multiple of four columns. */
function multiply(out, weight, x) {
  const columns = x.length
  for (let row = 0, at = 0; row < out.length; row++) {
    let one = 0, two = 0, three = 0, four = 0
    for (let column = 0; column < columns; column += 4, at += 4) {
      one += weight[at] * x[column]
      two += weight[at + 1] * x[column + 1]
      three += weight[at + 2] * x[column + 2]
      four += weight[at + 3] * x[column + 3]
    }
    out[row] = one + two + three + four
  }
}

function normalize(x, weight, epsilon) {
  let sum = 0
  for (const each of x) sum += each * each
  const scale = 1 / Math.sqrt(sum / x.length + epsilon)
  return x.map((each, at) => each * scale * weight[at])
}

/** The base: its numbers are read, and no swap writes to them. */
class Model {
  constructor(buffer, config, vocabulary) {
    this.config = config
    this.tensors = readTensors(buffer)
    this.ids = vocabulary
    this.letters = Object.fromEntries(Object.entries(vocabulary).map(([letter, id]) => [id, letter]))
    this.layers = layersOf(config)
  }

  weight(name) {
    return this.tensors[`model.${name}.weight`].data
  }

  /** W x + s · B (A x) for one layer, where `memory` has room for A and B. */
  apply(index, x, memory) {
    const { path, outputs } = this.layers[index], out = new Float32Array(outputs)
    multiply(out, this.weight(`layers.${path}`), x)
    const span = memory?.layout.spans[index], scaling = span && memory.scalings[index]
    if (!scaling) return out
    const { numbers } = memory, { start, pitch, rows } = span.band
    for (let row = 0; row < rows; row++) {
      const a = start + row * pitch + span.a, b = start + row * pitch + span.b
      let sum = 0
      for (let at = 0; at < x.length; at++) sum += numbers[a + at] * x[at]
      sum *= scaling
      for (let at = 0; at < outputs; at++) out[at] += sum * numbers[b + at]
    }
    return out
  }

  /** Turn pairs of each head by the token's position. */
  rotate(x, position) {
    const { head_dim: width, rope_parameters: { rope_theta: theta } } = this.config, half = width / 2
    for (let head = 0; head < x.length; head += width) {
      for (let at = 0; at < half; at++) {
        const angle = position / theta ** (at / half), cos = Math.cos(angle), sin = Math.sin(angle)
        const [one, two] = [x[head + at], x[head + half + at]]
        x[head + at] = one * cos - two * sin
        x[head + half + at] = two * cos + one * sin
      }
    }
    return x
  }

  /** The logits that follow a token; `cache` has the keys and values of those before it. */
  forward(token, cache, memory) {
    const { hidden_size: hidden, head_dim: width, num_hidden_layers: blocks, rms_norm_eps: epsilon } = this.config
    const grouped = this.config.num_attention_heads / this.config.num_key_value_heads
    const position = cache.length, own = []
    cache.push(own)
    let x = this.weight("embed_tokens").slice(token * hidden, (token + 1) * hidden)
    for (let block = 0; block < blocks; block++) {
      const layer = (at, input) => this.apply(block * 7 + at, input, memory)
      const add = more => { x = x.map((each, at) => each + more[at]) }
      let input = normalize(x, this.weight(`layers.${block}.input_layernorm`), epsilon)
      const query = this.rotate(layer(0, input), position)
      own[block] = [this.rotate(layer(1, input), position), layer(2, input)]
      const mixed = new Float32Array(query.length)
      for (let head = 0; head < query.length / width; head++) {
        const from = head * width, shared = Math.floor(head / grouped) * width
        const scores = cache.map(each => {
          let sum = 0
          for (let at = 0; at < width; at++) sum += query[from + at] * each[block][0][shared + at]
          return sum / Math.sqrt(width)
        })
        const highest = Math.max(...scores), shares = scores.map(score => Math.exp(score - highest))
        const total = shares.reduce((sum, share) => sum + share, 0)
        shares.forEach((share, before) => {
          const values = cache[before][block][1]
          for (let at = 0; at < width; at++) mixed[from + at] += (share / total) * values[shared + at]
        })
      }
      add(layer(3, mixed))
      input = normalize(x, this.weight(`layers.${block}.post_attention_layernorm`), epsilon)
      const gate = layer(4, input), up = layer(5, input)
      add(layer(6, gate.map((each, at) => (each / (1 + Math.exp(-each))) * up[at])))
    }
    const logits = new Float32Array(this.config.vocab_size)
    multiply(logits, this.weight("embed_tokens"), normalize(x, this.weight("norm"), epsilon))  // the two are tied
    return logits
  }

  /** The logits after each letter of a text. */
  logits(text, memory) {
    const cache = []
    return [...text].map(letter => this.forward(this.ids[letter], cache, memory))
  }

  /** The answer to a word of 1 to 10 small letters, the likeliest letter at a time. */
  answer(word, memory) {
    const cache = [], prompt = [...word + ">"].map(letter => this.ids[letter])
    let logits, text = ""
    for (const token of prompt) logits = this.forward(token, cache, memory)
    while (true) {
      const token = logits.indexOf(Math.max(...logits))
      if (token === this.config.eos_token_id) return text
      if (token > 2) text += this.letters[token]  // the first three stand for no letter
      if (cache.length === this.config.max_position_embeddings - 1) return text
      logits = this.forward(token, cache, memory)
    }
  }
}

/** What a model may be asked: it was trained on no other words. */
function isWord(text) {
  return /^[a-z]{1,10}$/.test(text)
}

// --- in a Web Worker: answers to the page's messages

/** The live model: its memory, another memory of the same layout for questions about other steps, and the files. */
class Live {
  constructor({ base, config, vocabulary, adapters }) {
    this.adapters = Object.fromEntries(
      Object.entries(adapters).map(([name, { file, config }]) => [name, readAdapter(file, config)]))
    const room = {}
    for (const adapter of Object.values(this.adapters))
      for (const [path, { rank }] of Object.entries(adapter)) room[path] = Math.max(room[path] ?? 0, rank)
    const layers = layersOf(config), layout = new Layout(layers, room)
    this.packed = Object.fromEntries(
      Object.entries(this.adapters).map(([name, adapter]) => [name, layout.pack(adapter)]))
    // all are in one piece of memory, as in a process: the base's file, then the two, and space for `unpadded`
    const size = layout.size * 4 + layers.length * 8, start = Math.ceil(base.byteLength / 64) * 64
    this.heap = new ArrayBuffer(start + 4 * size)
    new Uint8Array(this.heap).set(new Uint8Array(base))
    this.model = new Model(this.heap, config, vocabulary)
    this.memory = new Memory(layout, this.heap, start)
    this.other = new Memory(layout, this.heap, start + size)
    this.end = start + 2 * size
  }

  /** What the page must know of the model: its layers, and each adapter's rank in each of them. */
  opened() {
    const { layers } = this.model
    const ranks = own => layers.map(({ path }) => own[path]?.rank ?? 0)
    return { layers, ranks: Object.fromEntries(Object.entries(this.adapters).map(([name, own]) => [name, ranks(own)])) }
  }

  ends({ before, after }) {
    return [this.packed[before], this.packed[after]]
  }

  /** Write to the live memory, and say what is in it: each row's size in each layer, and one layer's first cells. */
  stop({ before, after, step, keeps, layer, columns }) {
    const { memory } = this, { layout, numbers } = memory
    memory.stop(...this.ends({ before, after }), step, keeps)
    const size = ({ band: { start, pitch }, a, inputs }, row) => {
      let sum = 0
      for (let at = 0; at < inputs; at++) sum += numbers[start + row * pitch + a + at] ** 2
      return Math.sqrt(sum / inputs)
    }
    const sizes = layout.spans.map(span => Array.from({ length: span.band.rows }, (_, row) => size(span, row)))
    const span = layout.spans[layer], first = span.band.start + span.a
    const cells = Array.from({ length: span.band.rows }, (_, row) => [span.a, span.b].map(at => {
      const from = span.band.start + row * span.band.pitch + at
      return [...numbers.subarray(from, from + columns)]
    }))
    return { sizes, cells, scaling: memory.scalings[layer], address: memory.address + first * 4 }
  }

  /** One layer of an adapter's file: the first cells of each row, and its scaling. */
  file({ name, layer, columns }) {
    const own = this.adapters[name][this.model.layers[layer].path]
    if (!own) return { cells: [], scaling: 0 }
    const cells = Array.from({ length: own.rank }, (_, row) => [
      [...own.a.subarray(row * own.inputs, row * own.inputs + columns)],
      Array.from({ length: columns }, (_, out) => own.b[out * own.rank + row]),
    ])
    return { cells, scaling: own.scaling }
  }

  /** The answer at a step, which the live memory need not be at; without `before`, that of the base alone. */
  answer({ before, after, step, keeps, word }) {
    if (!before) return this.model.answer(word, null)
    this.other.stop(...this.ends({ before, after }), step, keeps)
    return this.model.answer(word, this.other)
  }

  /** The answer of the live memory, as it is. */
  ask({ word }) {
    return this.model.answer(word, this.memory)
  }

  /** Milliseconds of one swap, there or back: the mean of many, since a browser's clock is coarse. */
  time({ before, after, times }) {
    const [one, two] = this.ends({ before, after }), start = performance.now()
    for (let done = 0; done < times; done += 2) {
      this.other.swap(two, one)
      this.other.swap(one, two)
    }
    return (performance.now() - start) / times
  }

  /** The same swap without room: each adapter in memory of its own size, one after the other. */
  unpadded({ before, after, layer, word }) {
    let address = this.end
    const found = [before, after].map(name => {
      const ranks = Object.fromEntries(Object.entries(this.adapters[name]).map(([path, { rank }]) => [path, rank]))
      const layout = new Layout(this.model.layers, ranks)
      const memory = new Memory(layout, this.heap, address), span = layout.spans[layer]
      memory.swap(layout.pack(this.adapters[name]))
      address += layout.size * 4 + layout.layers.length * 8
      const first = span && memory.address + (span.band.start + span.a) * 4
      return { rows: span?.band.rows ?? 0, address: first, scaling: memory.scalings[layer], memory }
    })
    const answer = this.model.answer(word, found[1].memory)
    return { before: { ...found[0], memory: null }, after: { ...found[1], memory: null }, answer }
  }
}

if (typeof WorkerGlobalScope !== "undefined") {
  let live
  onmessage = ({ data: { id, what, ...given } }) => {
    try {
      const result = what === "open" ? ((live = new Live(given)), live.opened()) : live[what](given)
      postMessage({ id, result })
    } catch (error) {
      postMessage({ id, error: String(error) })
    }
  }
}
