"""Answers to the exercises, wrong ones and right ones.

The wrong ones are what students write: half done, right by luck, the text misread, the adapter before left behind. Most
were thought up from the notebooks' texts alone. An answer is either code that takes the place of the solution's
functions of the same names, or a tuple: what is replaced in the solution, and by what, in turn.
"""

# ruff: noqa: E501
# fmt: off
from __future__ import annotations

#: the programs of chapter 03, and what the watch says of each that isn't mended
PROGRAMS = {
    "ranks": "a tensor has another shape: base_model.model.0.lora_A.default.weight",
    "warm_up": "a tensor has another shape: args[0]",
    "temperatures": "a Python number in the graph has changed: by",
    "names": "active_adapter",
    "gradients": "grad_mode",
}
SHOUT = 'hotswap_adapter(model, demo.adapter_path("shout"), adapter_name="default")'
LOAD = 'model.load_adapter(demo.adapter_path("shout"), "{0}")\n    model.set_adapter("{0}")'
RANKS, NAMES = (f"def {name}(model, folders, x):\n" for name in ("ranks", "names"))
SWAPS = "    for folder in folders:\n        hotswap_adapter(compiled, folder, 'default')\n        yield compiled(x)\n"
OFF, LENGTHS = 'layer.lora_B["default"].weight', "layer.get_base_layer().weight.norm(dim=1)"
FILTER = 'scaling * torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)'
SAME = "len(read) < len(ids) and torch.equal(ids[: len(read)], read)"
STEP = "first if step < at else second"
ENDS = "(alphas or [config.lora_alpha])[0]"
MATCHES = 're.fullmatch(rf"(.*\\.)?({end})", path)'
WRITE = "table[key].copy_(torch.as_tensor(value))"
SPACE = "whole = torch.zeros_like(room)"
FILL = "whole[: values.shape[0], : values.shape[1]] = values"
HIGHEST = "max(ranks.get(path, 0), len(a))"
EACH = "rank_pattern={f\"^{re.escape(path)}$\": r for path, r in ranks.items()}"
TENSOR = "torch.tensor(float(layer.scaling[NAME]), device=layer.lora_A[NAME].weight.device)"
COPY = "self.memory.copy_(self.packed[name])"
VIEW = "target.data = part.view(target.shape)"
PACKED = "torch.cat([torch.as_tensor(value).flatten() for _, _, value in writes]).to(self.memory)"
ASSIGN = "self.a[row], self.b[row] = padded(a, self.a[row]), scaling * padded(b, self.b[row])"
ADDED = "(inputs @ self.a.mT @ self.b.mT).view(*x.shape[:-1], -1)"
FREE = 'having = [n for n in numbers if name in replicas[n]["held"] and replicas[n]["waiting"] < most]'
FEWEST = 'min(having or numbers, key=lambda n: replicas[n]["waiting"])'
BOTH = "sorted([*in_code, *elsewhere])"
MOVED = "swapped[name].data_ptr() != bound[name].data_ptr()"
LAST = "def gradients(model, folders, x):\n    compiled = prepared(model, folders)\n    yield compiled(x)[:, :2]"
#: no more graphs, so the rest runs uncompiled
GIVES_UP = "torch._dynamo.config.recompile_limit = 1", "torch.compiler.set_stance('eager_on_recompile')"
GROUP, COUNTS = "groups.setdefault((row.adapter, prompt)", "row.version == now[row.adapter]"

#: by chapter and name
WRONG: dict[str, list[str | tuple[str, ...]]] = {
    "00 make_it_shout": [
        (SHOUT, SHOUT.replace("shout", "sort")),
        (SHOUT, 'model.delete_adapter("default")\n    ' + LOAD.format("default")),
        (SHOUT, LOAD.format("shout")),
        (SHOUT, "pass"),
        (SHOUT, 'return demo.load("shout")'),
        (SHOUT, 'model.load_adapter(demo.adapter_path("shout"), "shout")'),
        (SHOUT, f"from peft.utils.hotswap import hotswap_adapter\n    {SHOUT}"),
        (SHOUT, f"{SHOUT}\n    model.disable_adapter_layers()"),
    ],
    "01 part_01": [
        ("if config.use_rslora", "if False"),
        (ENDS, "config.lora_alpha"),
        (MATCHES, "end in path"),
        (MATCHES, "path.endswith(end)"),
        (MATCHES, "f'.{path}'.endswith(f'.{end}')"),  # right for words, and the keys are regular expressions
        (MATCHES, 're.search(rf"{end}$", path)'),
        (MATCHES, 're.search(rf"\\.({end})$", path)'),  # no alpha for a key that is a whole path
        (MATCHES, MATCHES.replace("path)", "'base_model.model.' + path)")),  # nor for one that begins with ^
        ("/ divisor", "/ torch.tensor(divisor)"),  # chapter 02 takes numbers
        ("adapter[path] = a, b, (alphas or [config.lora_alpha])[0] / divisor", "adapter[path] = a, b, round((alphas or [config.lora_alpha])[0] / divisor, 3)"),
        ("divisor = len(a) ** 0.5 if config.use_rslora else len(a)", "r = config.rank_pattern.get(path.split('.')[-1], config.r)\n            divisor = r**0.5 if config.use_rslora else r"),
        (ENDS, "(alphas[::-1] or [config.lora_alpha])[0]"),
        *((ENDS, f"config.alpha_pattern.get({name}, {ENDS})") for name in ("path", "path.split('.')[-1]")),
        ("path, a, b = match[1]", "path, a, b = match[1].split('.')[-1]"),
        ('r"base_model\\.model\\.(.+)\\.lora_A\\.weight"', 'r".*(model\\.layers\\..+)\\.lora_A\\.weight"'),  # this model's names
        ("path, a, b = match[1]", "path, a, b = key.removeprefix('base_model.model.').rstrip('.lora_A.weight')"),  # all of these letters
        ("divisor = len(a) ** 0.5 if config.use_rslora else len(a)", "divisor = config.r"),
        (ENDS, f"(config.lora_alpha if config.use_rslora else {ENDS})"),
    ],
    "01b part_01b": [
        ("for path, layer in layers.items():", "for path, layer in ((p, layers[p]) for p in adapter):"),
        ("in layers.items():", "in (each for each in layers.items() if 'layers.1.mlp' not in each[0]):"),
        ("if missing := adapter.keys() - layers.keys():", "if missing := '':"),
        ("if missing := adapter.keys() - layers.keys():", "if missing := [*adapter][len(layers) :]:"),
        ("if missing := adapter.keys() - layers.keys():", "if missing := adapter.keys() - dict(model.get_base_model().named_modules()).keys():"),
        ("adapter.keys() - layers.keys():", "[each for each in adapter if each.split('.')[-1] not in str(layers)]:"),
        ("torch.zeros_like(room_b), 0.0", "torch.zeros_like(room_b), float('nan')"),  # zero times that
        ("layer.lora_A[NAME]._parameters", "layer.lora_A[NAME].state_dict()"),  # what a Pool does to the parameters is not seen
        ("    with torch.no_grad():\n", "    torch.set_grad_enabled(False)\n    if True:\n", "                table[key] = value", "                table[key] = value\n    torch.set_grad_enabled(True)"),
        ("torch.zeros_like(room_a), torch.zeros_like(room_b)", "torch.zeros(1, 1), torch.zeros(1, 1)", "values = padded(a, room_a), padded(b, room_b)", "values = (padded(a, room_a), padded(b, room_b)) if path in adapter else (a, b)"),
        (WRITE, "if key == 'weight':\n                    table[key].copy_(value)\n                else:\n                    table[key].data = torch.tensor(value)"),
        ("torch.zeros_like(room_a), torch.zeros_like(room_b)", "torch.zeros(8, room_a.shape[1]), torch.zeros(len(room_b), 8)"),
        # only write raises
        ("    return writes", "    return [None] if adapter.keys() - layers.keys() else writes", "    if missing := adapter.keys() - layers.keys():\n", "    if missing := '':\n", "    with torch.no_grad():\n", "    if writes == [None]:\n        raise ValueError\n    with torch.no_grad():\n"),
        ("writes.append((layer", "write(writes[-2:])\n        writes.append((layer"),
        (WRITE, "table[key] = torch.nn.Parameter(torch.as_tensor(value))"),
        (WRITE, "table[key].data = torch.as_tensor(value)"),
        (WRITE, WRITE.replace("copy_", "add_")),
        ("values = padded(a, room_a), padded(b, room_b)", "values = a, b"),
        ("isinstance(table[key], torch.Tensor)", "key == 'weight'"),
        ("writes.append((layer", "path in adapter and writes.append((layer"),  # right here, and chapter 04's pool fails
        ("with torch.no_grad():", "if True:"),  # right in a model that isn't trained, as that of chapter 02 is
        ("adapter.get(path, off)", "adapter.pop(path, off)"),  # right once
        ("adapter.get(path, off)", "adapter.setdefault(path, off)"),
        ("torch.zeros_like(room_a), torch.zeros_like(room_b)", "room_a.detach() * 0, room_b.detach() * 0"),
        (WRITE, WRITE.replace(".copy_", ".requires_grad_(False).copy_")),  # the model is no longer trained
        ("    with torch.no_grad():\n", "    torch.set_grad_enabled(False)\n    if True:\n"),
        (WRITE, f"table[key].requires_grad_(False)\n                {WRITE}\n                table[key].requires_grad_(True)"),
        ("a, b, scaling = adapter.get(path, off)", "a, b, _ = adapter.get(path, off)\n        scaling = next(iter(adapter.values()))[2]"),
        (  # right, and what chapter 02 does to padded is in vain
            *("values = padded(a, room_a), padded(b, room_b)", "values = a, b"),
            *("writes += [", "if a.shape != room_a.shape or b.shape != room_b.shape:\n            raise ValueError\n        writes += ["),
        ),
    ],
    "02 part_02": [
        (SPACE, "whole = torch.zeros(room.shape)"),
        (SPACE, "whole = room.clone()"),
        (SPACE, "whole = room * 0"),
        (SPACE, "whole = room.zero_()"),
        (SPACE, "whole = room.detach().zero_().clone()"),
        (SPACE, f"if values.shape == room.shape:\n        return values\n    {SPACE}"),
        (SPACE, f"if values.shape == room.shape:\n        return values.to(room.dtype)\n    {SPACE}"),
        (SPACE, f"if values.shape == room.shape:\n        return values.clone()\n    {SPACE}"),
        (FILL, "whole[-values.shape[0] :, -values.shape[1] :] = values"),
        ("zip(values.shape, room.shape, strict=True)", "zip(values.shape[:1], room.shape)"),
        ("zip(values.shape, room.shape, strict=True)", "zip(values.shape[1:], room.shape[1:])"),
        (
            *("for size, largest in zip(values.shape, room.shape, strict=True)", "for size, largest in ()"),
            *(FILL, "rows, columns = room.shape\n    whole[: len(values), : len(values.T)] = values[:rows, :columns]"),
        ),
        (HIGHEST, "len(a)"),
        (HIGHEST, "32"),
        (HIGHEST, "max(ranks.get(path, 8), len(a))"),  # LoRA's usual rank
        (HIGHEST, "min(ranks.get(path, 99), len(a))"),
        (HIGHEST, "ranks.get(path, 0) + len(a)"),
        ("LoraConfig(target_modules=[*ranks], " + EACH + ")", "LoraConfig(r=32, target_modules=[*ranks])"),
        (EACH, "rank_pattern={path.split('.')[-1]: r for path, r in ranks.items()}"),
        ("any(size > largest for size, largest in zip(values.shape, room.shape, strict=True))", "values.shape > room.shape"),
        ("get_peft_model(base,", "get_peft_model(__import__('copy').deepcopy(base),"),
        ("target_modules=[*ranks]", "target_modules={path.split('.')[-1] for path in ranks}"),
        ("for adapter in family:", "for adapter in family[:1]:"),
        ("for adapter in family:", "for adapter in [max(family, key=len)]:"),
        ("target_modules=[*ranks]", "target_modules=[*adapter]"),
        (".eval()", ""),
    ],
    "03 part_03": [
        ("    return model", ""),
        (TENSOR, TENSOR.replace("lora_A[NAME]", "base_layer")),
        ("    return model", "        return model"),
        ("    for layer", "    import copy\n    model = copy.deepcopy(model)\n    for layer"),
        ("in layers_of(model).values():", "in [*layers_of(model).values()][1:]:"),
        (TENSOR, "torch.ones((), device=layer.lora_A[NAME].weight.device)"),
        (TENSOR, TENSOR.replace("float(layer.scaling[NAME])", "[layer.scaling[NAME]]")),
        (TENSOR, "torch.tensor(float(layer.scaling[NAME]))"),
        (TENSOR, "torch.tensor(float(layer.scaling[NAME]), device=model.device)"),
        (TENSOR, TENSOR.replace("float", "int")),
        (TENSOR, TENSOR.replace("float(layer.scaling[NAME])", "layer.scaling[NAME]")),  # whole numbers stay such
        (TENSOR, f"shared.setdefault(NAME, {TENSOR})", "    for layer", "    shared = {}\n    for layer"),
        (TENSOR, "float(layer.scaling[NAME])"),
        *((f"= {TENSOR}", f"= ({TENSOR}, float(layer.scaling[NAME]))[model.device.type == 'cpu']", "    return model", f"    {each}\n    return model") for each in GIVES_UP),
    ],
    "03 debug": [
        (RANKS, f"{RANKS}    prepared = lambda model, _: model\n"),
        (RANKS, f"{RANKS}    prepared = lambda model, _: torch.compile(model, disable=True)\n"),
        (RANKS, f"{RANKS}    prepared = lambda model, _: torch.compile(model, backend='eager', dynamic=True)\n"),
        (RANKS, f"{RANKS}    torch.compiler.set_stance('force_eager')\n"),
        *((LAST, LAST.replace("    yield", f"    compiled(x[:1])\n    {each}\n    yield")) for each in GIVES_UP),
        *((LAST, LAST.replace("    yield", f"{each}\n    torch.compiler.reset()\n    yield")) for each in ("    compiled(x[:1])", "    with torch.enable_grad():\n        compiled(x)")),
        (NAMES, f"{NAMES}    yield from [prepared(model, folders)(x)] * 3\n    return\n"),
        (NAMES, f"{NAMES}    folders = folders[:2]\n"),
        ("torch.tensor(by)", "by"),
        ("torch.tensor(by)", "float(by)"),
        ("yield soften(x, torch.tensor(by))", "yield soften(x, torch.tensor(1))"),
        ("def gradients(", "def no_gradients("),  # one too few
        (LAST, LAST.removesuffix("    yield compiled(x)[:, :2]")),  # now the first request waits
        (LAST, LAST.replace("    yield", "    torch.set_grad_enabled(True)\n    yield")),
    ],
    "04 part_04": [
        (COPY, "self.memory = self.packed[name]"),
        (".to(targets[0].dtype)", ".double()"),
        (".to(targets[0].dtype)", "", VIEW, f"{VIEW}.to(target.dtype)"),
        (".to(targets[0].dtype)", ""),  # with the scalings, half precision becomes float32
        (VIEW, f"{VIEW}.clone()"),
        (COPY, "[a.copy_(b) for a, b in zip(self.memory.split(999), self.packed[name].split(999))]"),
        (PACKED, f"{PACKED} * 1.001"),
        (PACKED, f"self.memory.copy_({PACKED})"),  # all of them the same memory, with the last adapter in it
        (PACKED, f"{PACKED}[: sum(a.numel() + b.numel() for a, b, _ in family[name].values())]", COPY, "self.memory[: len(self.packed[name])] = self.packed[name]"),
        (COPY, "write(plan(self.model, self.family[name]))", "        plans", "        self.model, self.family = model, family\n        plans"),
        (PACKED, f"{PACKED}.flip(0)"),
        *((COPY, f"if name != self.active:\n            {COPY}\n        self.active = name", "        plans =", f"        self.active = {first}\n        plans =") for first in ("next(iter(family))", "[*family][-1]", "None")),
        (COPY, "self.memory += self.packed[name] - self.now\n        self.now = self.packed[name]", "        self.packed =", "        self.now = self.memory.clone()\n        self.packed ="),
        (COPY, f"torch.set_grad_enabled(False)\n        {COPY}"),
        (VIEW, f"{VIEW}\n            target.requires_grad_(False)"),
        (VIEW, f"{VIEW}\n            target.requires_grad_()"),
        ("        plans =", "        torch.set_grad_enabled(False)\n        plans ="),
        (  # what is in the model at first is not counted: rows of it stay behind
            *(COPY, "for to, of in zip(self.parts, self.packed[name].split(self.sizes)):\n            if of.any() or to is not None and to.data_ptr() in self.used:\n                to.copy_(of)\n        self.used = {to.data_ptr() for to, of in zip(self.parts, self.packed[name].split(self.sizes)) if of.any()}"),
            *("        self.packed =", "        self.used, self.sizes = set(), [len(self.memory) // 5 + 1] * 4\n        self.sizes += [len(self.memory) - sum(self.sizes)]\n        self.parts = self.memory.split(self.sizes)\n        self.packed ="),
        ),
        ("self.memory = torch.cat(", "self.memory = torch.zeros_like(torch.cat(", "for each in targets])\n", "for each in targets]))\n"),
        ("for _, _, value in writes]", "for _, key, value in writes if key == 'weight']", "for table, key, _ in next(iter(plans.values()))]", "for table, key, _ in next(iter(plans.values())) if key == 'weight']"),
        (COPY, f"{COPY}\n        self.packed = dict.fromkeys(self.packed, self.packed[name])"),
        (  # packed when it is needed first, which takes as long as chapter 01's swap
            *(COPY, f"if name not in self.packed:\n            self.packed[name] = torch.cat([torch.as_tensor(v).flatten() for *_, v in plan(self.model, self.family[name])])\n        {COPY}"),
            *("        plans =", "        self.model, self.family = model, family\n        plans ="),
            *("            for name, writes in plans.items()", "            for name, writes in ()"),
        ),
        (  # the scalings one by one, and each swap puts other tensors there
            *(COPY, f"{COPY}\n        for (table, key, _), (_, _, value) in zip(self.plans[name], self.plans[name]):\n            if key != 'weight':\n                table[key] = torch.tensor(float(value))"),
            *("        plans =", "        self.plans = plans ="),
        ),
        (  # what others have written is left where the adapter has nothing
            *(COPY, "used = self.packed[name] != 0\n        self.memory[self.used] = 0\n        self.memory[used] = self.packed[name][used]\n        self.used = used"),
            *("        self.packed =", "        self.used = self.memory != 0\n        self.packed ="),
        ),
        (  # one call for each layer
            *(COPY, "for to, of in self.layers[name]:\n            torch._foreach_copy_(to, of)"),
            *("        self.packed =", "        split = lambda all: [all[at : at + 3] for at in range(0, len(all), 3)]\n        self.layers = {name: [*zip(split([table[key].data for table, key, _ in writes]), split([torch.as_tensor(value) for *_, value in writes]))] for name, writes in plans.items()}\n        self.packed ="),
        ),
        (  # the first swap moves the tensors
            *("            target.data =", "            self.later.append((target, part.view(target.shape)))\n            continue\n            target.data =", "        plans =", "        self.later = []\n        plans ="),
            *(COPY, f"for target, part in self.later:\n            target.data = part\n        {COPY}"),
        ),
        (  # the layers that one of the family has
            *("        plans =", "        paths = {path for each in family.values() for path in each}\n        some = {id(t) for path, layer in layers_of(model).items() if path in paths for t in (layer.lora_A[NAME]._parameters, layer.lora_B[NAME]._parameters, layer.scaling)}\n        plans ="),
            *("plan(model, adapter)", "[each for each in plan(model, adapter) if id(each[0]) in some]"),
        ),
        ("        self.memory.copy_(", "        torch._foreach_copy_(self.targets, self.parts[", "self.packed[name])", "name])", "        for target, part", "        self.targets = targets\n        self.parts = {name: [torch.as_tensor(value) for *_, value in writes] for name, writes in plans.items()}\n        for target, part"),  # not where gradients are on
    ],
    "05 take_turns": [
        (SAME, "False"),
        (SAME, "True"),
        (SAME, "len(read) and ids[0] == read[0]"),
        (SAME, "len(read) < len(ids)"),
        (SAME, "len(read) < len(ids) and torch.equal(ids[: len(read) - 1], read[:-1])"),
        (SAME, "len(read) < len(ids) and ids[: len(read)].sum() == read.sum()"),
        ("        chat.restore(saved)\n", "        if chat.length != len(read):\n            chat.restore(saved)\n", "    chat.forget()\n", "", "    logits =", "    else:\n        chat.forget()\n    logits =", "ids[chat.length :]", "ids[len(read) if torch.equal(ids[: len(read)], read) and len(read) < len(ids) else 0 :]"),
        (SAME, "0 < len(read) < len(ids) and (read[0], read[-1]) == (ids[0], ids[len(read) - 1])"),
        (SAME, "torch.equal(ids[: len(read)], read)"),  # nothing is left to read of the same prompt again
        (SAME, "0 < len(read) <= len(ids) and read[0] == ids[0]"),
        (SAME, "0 < len(read) <= len(ids) and read[-1] == ids[len(read) - 1]"),
        (SAME, "all(one == other for one, other in zip(read, ids))"),
        (SAME, "len(read) < len(ids) and str(ids.tolist())[:-1].startswith(str(read.tolist())[:-1])"),  # 33 begins with 3
        (SAME, f"len(ids) > len(read) + 1 and {SAME}"),
        ("    pool.swap(name)\n", "", "    return logits", "    pool.swap(name)\n    return logits"),
        ("    pool.swap(name)\n", ""),
        ("    chat.forget()\n", ""),
        ("    pool.swap(name)\n", "    if pool.active != name:\n        pool.swap(name)\n"),
        ("    pool.swap(name)\n", "    if kept:\n        pool.swap(name)\n"),
        ("    chat.forget()\n", "    if kept:\n        chat.forget()\n"),
        ("    return logits", "    return logits.argmax()"),
        ("    return logits", "    pool.off()\n    return logits"),
        ("    return logits", "    chat.forget()\n    return logits"),
        ("    pool.swap(name)\n", "    before = pool.active\n    pool.swap(name)\n", "    return logits", "    pool.swap(before or name)\n    return logits"),
        # what the adapter answered is behind the prompt
        ("    pool.swap(name)\n", "    same = pool.active == name\n    pool.swap(name)\n", "        chat.restore(saved)\n", "        if not same:\n            chat.restore(saved)\n"),
        ("kept.get(name, ", "kept.get('both', ", "kept[name] =", "kept['both'] ="),
        (  # one list of what was read last, by whichever adapter
            *("kept.get(name, (ids[:0], chat.save()))", "kept.get('ids', ids[:0]), kept.get(name)"),
            *(SAME, f"saved and {SAME}", "kept[name] = ids, chat.save()", "kept['ids'], kept[name] = ids, chat.save()"),
        ),
        ("kept[name] = ids, chat.save()", "kept.setdefault(name, (ids, chat.save()))"),
        ("    kept[name] = ids, chat.save()", "    if name not in kept or len(kept[name][0]) < 9:\n        kept[name] = ids, chat.save()\n    else:\n        kept[name] = kept[name][0], chat.save()"),
        ("    return logits", "    return None"),
    ],
    "06 one_filter": [
        (FILTER, "a"),
        (FILTER, FILTER.removeprefix("scaling * ")),
        ("->oihw", "->oiwh"),
        (FILTER, f"{FILTER} * scaling"),
        (FILTER, f"{FILTER} / len(a)"),
        (FILTER, "scaling * b[:, :1] * a[:1]"),
        (FILTER, f"{FILTER}.flip(2, 3)"),
        (FILTER, "scaling * (a.flatten(1).T @ b.flatten(1).T).reshape(len(b), *a.shape[1:])"),
        ("->oihw", "->iohw"),
    ],
    "06 halfway": [
        ("step < at", "step <= at"),
        ("step < at", "step + 1 < at"),
        (STEP, "second if step < at else first"),
        (STEP, "first"),
        (STEP, "second"),
        ("step < at", "step < 5"),
        ("step < at", "when < at"),
        ("enumerate(scheduler.timesteps)", "enumerate([*scheduler.timesteps] * 2)"),
        ("    return picture", "    return (picture / 2 + 0.5).clamp(0, 1)"),
        ("    for step", "    noise = picture\n    for step", "model(picture,", "model(noise if step == at else picture,"),
    ],
    "07 turn_off": [
        (".fill_(1)", ".zero_()"),
        (f"{OFF}.zero_()", f"{OFF}.data = 0 * {OFF}"),
        (".fill_(1)", ".data = 1 + 0 * layer.ia3_l['default']"),
        ('layer.ia3_l["default"].fill_(1)', "pass"),
        ("    if hasattr", "    return layer.enable_adapters(False)\n    if hasattr"),
        ("    if hasattr", "    layer.forward = layer.get_base_layer().forward\n    return\n    if hasattr"),
        (f"copy_({LENGTHS})", f"fill_({LENGTHS.replace('dim=1', 'dim=0')}[0])"),
        (f"copy_({LENGTHS})", f"fill_({LENGTHS.replace('dim=1', '')})"),
        (f"copy_({LENGTHS})", "fill_(1)"),
        (LENGTHS, LENGTHS.replace("norm(", "square().sum(")),
        (f"{OFF}.zero_()", "layer.scaling['default'] = 0"),
    ],
    "07 make_equal": [
        ("module.scaling.update(other.scaling)", "pass"),
        ("    tensors = dict(", "    return live.load_state_dict(fresh.state_dict())\n    tensors = dict("),
        # right outputs, new addresses
        ("    tensors = dict(", "    live.base_model = fresh.base_model\n    tensors = dict("),
        ("    tensors = dict(", "    live.forward = fresh.forward\n    return\n    tensors = dict("),
        ("[*fresh.named_parameters(), *fresh.named_buffers()]", "fresh.named_parameters()"),
        ("tensors[name].copy_(tensor)", "tensors[name].data = tensor.data"),
        ("tensors[name].copy_(tensor)", "tensor.copy_(tensors[name])"),
        ("tensors[name].copy_(tensor)", "tensors[name].add_(tensor)"),
        ("module.scaling.update(other.scaling)", 'module.scaling["default"] = fresh.peft_config["default"].lora_alpha / fresh.peft_config["default"].r'),
    ],
    "08 part_08": [
        ("scaling * padded(b", "padded(b"),
        (ASSIGN, "self.a[row, : len(a)], self.b[row, :, : len(a)] = a, b * scaling"),  # the text of chapter 02 forgotten
        ("self.a[row], self.b[row] =", "self.a[:], self.b[row] ="),
        (ADDED, "torch.stack([i @ a.T @ b.T for i, a, b in zip(inputs, self.a, self.b)]).view(*x.shape[:-1], -1)"),
        (ASSIGN, f"self.a, self.b = self.a.clone(), self.b.clone()\n        {ASSIGN}"),
        (ASSIGN, f"torch.set_grad_enabled(False)\n        {ASSIGN}"),
        (ASSIGN, f"{ASSIGN}\n        self.a[row + 1 :] = 0"),  # right in this order
        (ASSIGN, "self.a[row], self.b[row] = padded(a, self.a[row]), padded(b * scaling, self.b[row])"),  # rounded twice
        (ASSIGN, "self.a[row], self.b[row] = padded(a * scaling, self.a[row]), padded(b, self.b[row])"),
        ("inputs = x if x.dim() == 3 else x[:, None]", "inputs = x", ADDED, ADDED.removesuffix(".view(*x.shape[:-1], -1)")),
        (  # the same with a scaling of its own, which hides it where the layers differ
            *(ASSIGN, "self.a[row, : len(a)], self.b[row, :, : len(a)], self.scaling[row] = a, b, scaling"),
            *(ADDED, f"self.scaling.view(-1, *[1] * (x.dim() - 1)) * {ADDED}"),
            *("self.linear = linear", "self.linear, self.scaling = linear, torch.zeros(rows)"),
        ),
        (ADDED, "(lambda y: y if x.dim() == 3 else y.squeeze())(inputs @ self.a.mT @ self.b.mT)"),
        ("self.linear(x) + ", ""),
        ("self.linear(x) + ", "x @ self.linear.weight.T + "),  # no layer of the demo has a bias
        (ADDED, "(inputs @ self.a.mT @ self.b.mT).squeeze(1)"),  # each text has one token while generating
        (ASSIGN, "self.a[row], self.b[row, :, : len(a)] = padded(a, self.a[row]), b * scaling"),
        (ASSIGN, "self.a[row] += padded(a, self.a[row])\n        self.b[row] += padded(b * scaling, self.b[row])"),
        ("scaling * padded(b", "padded(b", ADDED, f"self.scaling * {ADDED}", "self.a[row], self", "self.scaling = scaling\n        self.a[row], self", "self.linear =", "self.scaling = 0.0\n        self.linear ="),
        ("self.a[row], self.b[row] =", "self.a[row - 1], self.b[row - 1] ="),
        (ASSIGN, f"self.a.data, self.b.data = self.a.clone(), self.b.clone()\n        {ASSIGN}"),
        (ASSIGN, "self.b[row] = 0\n        self.a[row, : len(a)], self.b[row, :, : len(a)] = a, b * scaling"),  # infinity in A times zero in B
        (ASSIGN, f"self.b[row] = 0\n        {ASSIGN}"),  # half of it is done before the refusal
        (ASSIGN, "self.a[row], self.b[row] = 0, 0\n        self.a[row, : len(a)], self.b[row, :, : len(a)] = a, scaling * b"),  # as here
        ("torch.zeros(rows, rank, linear.in_features), torch.zeros(rows,", "torch.empty(rows, rank, linear.in_features), torch.empty(rows,"),
        ("torch.zeros(rows, rank, linear.in_features), torch.zeros(rows, linear.out_features, rank)", "map(torch.nn.Parameter, (torch.zeros(rows, rank, linear.in_features), torch.zeros(rows, linear.out_features, rank)))"),  # assign raises where gradients are on
        (ASSIGN, f"most = self.a.shape[1]\n        a, b = a[:most], b[:, :most]\n        {ASSIGN}"),  # what has no place is cut off
        (ASSIGN, "self.linear.weight += b @ a * scaling"),
        ("torch.zeros(rows, rank, linear.in_features), torch.zeros(rows, linear.out_features, rank)", "(torch.zeros(rows, *shape, dtype=torch.half) for shape in ((rank, linear.in_features), (linear.out_features, rank)))", ADDED, ADDED.replace(".mT", ".float().mT")),
    ],
    "09 choose_replica": [
        ("having or numbers", "numbers"),
        ('["waiting"] < most', '["waiting"] <= most'),
        ("    numbers = range(len(replicas))", "    numbers = range(len(replicas))[::-1]"),
        (' and replicas[n]["waiting"] < most', ""),
        (FEWEST, "(having or numbers)[0]"),
        (FEWEST, f"having[0] if having else {FEWEST}"),
        (FEWEST, f"{FEWEST} if having else 0"),
        (FEWEST, f"{FEWEST} if having else None"),
        (FEWEST, FEWEST.replace("min", "max")),
        (FEWEST, f"replicas[{FEWEST}]"),
        (f"    return {FEWEST}", f"    chosen = {FEWEST}\n    replicas[chosen]['waiting'] += 1\n    return chosen"),
    ],
    "10 unreached": [
        (BOTH, "sorted(in_code)"),
        (BOTH, "sorted(n for n in swapped if not any(c.endswith(n) for c in constants) or n in bound and bound[n].data_ptr() != swapped[n].data_ptr())"),
        (BOTH, "sorted(n for (n, t), b in zip(swapped.items(), bound.values()) if t.data_ptr() != b.data_ptr())"),
        (BOTH, "sorted(elsewhere)"),
        (MOVED, "swapped[name] is not bound[name]"),
        (MOVED, "not swapped[name].equal(bound[name])"),
        (BOTH, f"{BOTH}[::-1]"),
        (MOVED, MOVED.replace(".data_ptr()", ".untyped_storage().data_ptr()")),  # a pool's tensors have one storage
        (MOVED, "swapped[name].data_ptr() not in {each.data_ptr() for each in bound.values()}"),
        (BOTH, "[each for each in swapped if each in {*in_code, *elsewhere}]"),
        (BOTH, "sorted(swapped.keys() - {*in_code, *elsewhere})"),
        (BOTH, "{*in_code, *elsewhere}"),
        (BOTH, "sorted([*in_code, *elsewhere, *(constants - swapped.keys())])", "set(constants)", "(constants := set(constants))"),
    ],
    "11 two_tricks": [
        (GROUP, "groups.setdefault(prompt"),
        (GROUP, "groups.setdefault(row.adapter"),
        (GROUP, "groups.setdefault((row.adapter, row.version)"),
        ("rewards[row.adapter](text)", 'rewards["shout"](text)'),
        (COUNTS, "True"),
        (
            *(COUNTS, "True", "            found[number] = each - mean"),
            "            found[number] = (each - mean) * (rows[number].version == now[rows[number].adapter])",
        ),
        ("            found[number] = each - mean", "            found[number] = (each - mean) / (max(group.values()) - min(group.values()) or 1)"),
        ("            found[number] = each - mean", "            found[number] = each"),
        ("    return found", "    return [each for each, row in zip(found, rows) if row.version == now[row.adapter]]"),
        (COUNTS, "row.version == max(each.version for each in rows if each.adapter == row.adapter)"),
        (COUNTS, "row.version == max(now.values())"),
        (COUNTS, "row.version in now.values()"),
        ("            found[number] = each - mean", "            found[number] = each - mean if len(group) > 1 else each"),
    ],
    "engine my_gains": [
        ('table["default"] * gain', "gain"),
        ('draft.refuse("not_in_pool", name=path, found=f"{len(layers)} layers of the model")', "pass"),
        ('journal.set_item(table, "default", value)', "table.update(default=value)"),
        ("        change.steps.append(", '        table["default"] = value\n        change.steps.append('),
        ("table=table, value=value", "table=table", "lambda journal", "lambda journal, value=2.0"),
        ("lambda journal, table=table, value=value: journal.set_item(table, \"default\", value)", "lambda journal: journal.set_item(table, \"default\", value)"),
        ("layers[path].scaling", "next(iter(layers.values())).scaling"),
    ],
    "engine my_search": [
        ("    change.apply([plan.change()])\n", ""),
        ("room=of_room", "room=settings[number].scaling"),
        ("writing=of_memory", "writing=of_room"),
        ('prepared=table["default"]', "prepared=of_memory"),
        ("the_room.scalings[0][number, 0]", "the_room.scalings[0][0, 0]"),
        ("settings=settings[number].scaling", "settings=of_memory"),
        ("Adapter.load(folder)", "Adapter.load(folder.replace('double', 'shout'))"),  # the notebook's own
    ],
}

#: the same, differently written
RIGHT: dict[str, list[str | tuple[str, ...]]] = {
    "00 make_it_shout": [
        (SHOUT, 'hotswap_adapter(model, demo.adapter_path("shout"), model.active_adapter)'),
        (
            SHOUT,
            "from hotswap_lab import Adapter, hotswap_adapter_from_state_dict\n"
            '    new = Adapter.load(demo.adapter_path("shout"))\n'
            '    hotswap_adapter_from_state_dict(model, new.tensors, "default", config=new.config)',
        ),
        (SHOUT, '[hotswap_adapter(model, demo.adapter_path(name), "default") for name in ("sort", "shout")]'),
        (SHOUT, '__import__("hotswap_lab").AdapterPool(model, adapters={"shout": demo.adapter_path("shout")}, progress=False).swap("shout")'),
    ],
    "01 part_01": [
        """
def read(folder):
    config, tensors = LoraConfig.from_pretrained(folder), load_file(f"{folder}/adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        path, word, _ = key.rpartition(".lora_A.weight")
        if not word:
            continue
        path, b, alpha = path.removeprefix("base_model.model."), tensors[f"{path}.lora_B.weight"], config.lora_alpha
        for pattern, other in config.alpha_pattern.items():
            if re.search(rf"(^|\\.)({pattern})$", path):
                alpha = other
                break
        found[path] = [a, b, alpha / (a.shape[0] ** 0.5 if config.use_rslora else a.shape[0])]
    return found
""",
        """
def read(folder):
    config, found = LoraConfig.from_pretrained(folder), {}
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    for key in sorted(tensors):
        if key.endswith("lora_A.weight"):
            path = key[len("base_model.model.") : -len(".lora_A.weight")]
            own = next((n for key, n in config.alpha_pattern.items() if re.match(rf"(.*\\.)?({key})$", path)), config.lora_alpha)
            a, b = tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]
            found[path] = a, b, own / len(a) ** (0.5 if config.use_rslora else 1)
    return found
""",
        ("alphas = [alpha for end, alpha in config.alpha_pattern.items() if re.fullmatch(rf\"(.*\\.)?({end})\", path)]", "alphas = [config.alpha_pattern[end] for end in config.alpha_pattern if re.match(rf\"(.*\\.)?({end})$\", path)]"),
        ("divisor = len(a) ** 0.5 if config.use_rslora else len(a)", "divisor = {True: len(a) ** 0.5, False: len(a)}[config.use_rslora]"),
    ],
    "01b part_01b": [
        """
def write(writes):
    for table, key, value in writes:
        if not isinstance(table[key], torch.Tensor):
            table[key] = value
        elif table[key].dim():
            table[key].data[:] = value
        else:
            table[key].data.fill_(value)
""",
        """
@torch.no_grad()
def write(writes):
    tensors = [(table[key], value) for table, key, value in writes if key == "weight"]
    torch._foreach_copy_(*map(list, zip(*tensors))) if tensors else None
    for table, key, value in writes:
        if key != "weight":
            table[key] = table[key].fill_(value) if torch.is_tensor(table[key]) else value
""",
        """
def plan(model, adapter):
    layers, triples = layers_of(model), []
    for path in adapter:
        if path not in layers:
            raise ValueError(path)
    for path in reversed(layers):
        layer = layers[path]
        triples.append((layer.scaling, NAME, adapter[path][2] if path in adapter else 0))
        for number, part in ((1, layer.lora_B), (0, layer.lora_A)):
            room = part[NAME].weight
            new = padded(adapter[path][number], room) if path in adapter else torch.zeros(room.shape, dtype=room.dtype)
            triples.append((part[NAME]._parameters, "weight", new))
    return triples
""",
        (WRITE, "table[key][...] = torch.as_tensor(value)"),
    ],
    "02 part_02": [
        """
def padded(values, room):
    right, below = room.shape[1] - values.shape[1], room.shape[0] - values.shape[0]
    if min(right, below) < 0:
        raise ValueError(f"{values.shape} in {room.shape}")
    return torch.nn.functional.pad(values, (0, right, 0, below)).to(room.dtype).clone()
""",
        """
def padded(values, room):
    if values.shape[0] > room.shape[0] or values.shape[1] > room.shape[1]:
        raise ValueError("too large")
    new = room.new_zeros(room.shape)
    new.narrow(0, 0, values.shape[0]).narrow(1, 0, values.shape[1]).copy_(values)
    return new
""",
        """
def prepare(base, family):
    most = {}
    for number in range(len(family)):
        for path in family[number]:
            rank = family[number][path][0].shape[0]
            if path not in most or most[path] < rank:
                most[path] = rank
    patterns = {"^" + re.escape(path) + "$": most[path] for path in most}
    model = get_peft_model(base, LoraConfig(r=1, target_modules=list(most), rank_pattern=patterns), NAME)
    model.eval()
    return model
""",
        """
def prepare(base, family):
    paths = sorted({path for each in family for path in each})
    ranks = {path: max(each[path][1].shape[1] for each in family if path in each) for path in paths}
    config = LoraConfig(
        r=max(ranks.values()), target_modules=paths, init_lora_weights=False, lora_alpha=3,
        rank_pattern={rf"^{re.escape(path)}$": ranks[path] for path in paths[::-1]},
    )
    return get_peft_model(base, config, adapter_name=NAME).train(False)
""",
    ],
    "03 part_03": [
        (TENSOR, "layer.lora_B[NAME].weight.detach().new_tensor(layer.scaling[NAME])"),
        (TENSOR, "torch.full((), float(layer.scaling[NAME]), device=layer.lora_A[NAME].weight.device)"),
        (TENSOR, "torch.tensor([float(layer.scaling[NAME])]).to(next(layer.lora_A.parameters()).device)[0]"),
        (
            f"layer.scaling[NAME] = {TENSOR}",
            "layer.scaling = {name: torch.as_tensor(float(each)).to(layer.lora_A[name].weight.device) for name, each in layer.scaling.items()}",
        ),
    ],
    "03 debug": [
        (f"{NAMES}    yield from compiling.answers(prepared(model, folders), folders, x)", f"{NAMES}    compiled = prepared(model, folders)\n{SWAPS}".rstrip()),
        ("torch.tensor(by)", "torch.full((), float(by))"),
        ("torch.compile(lambda x, by: model(x) / by,", "torch.compile(lambda x: model(x),", "soften(x, torch.tensor(by))", "soften(x) / by"),
        (RANKS, f"{RANKS}    prepared = lambda *_: [prepare_model_for_compiled_hotswap(model, target_rank=8), torch.compile(model, backend='eager')][1]\n"),
    ],
    "04 part_04": [
        """
class Pool:
    def __init__(self, model, family):
        self.targets, self.values = [], {}
        for name, adapter in family.items():
            writes = plan(model, adapter)
            self.targets = [table[key].data for table, key, _ in writes]
            self.values[name] = [torch.as_tensor(value).to(old) for (_, _, value), old in zip(writes, self.targets)]

    def swap(self, name):
        torch._foreach_copy_(self.targets, self.values[name])
""",
        """
class Pool:
    def __init__(self, model, family):
        self.halves, self.saved = {}, {}
        targets = {name: {} for name in ("weight", NAME)}
        for layer in layers_of(model).values():
            for table, key in ((layer.lora_A[NAME]._parameters, "weight"), (layer.lora_B[NAME]._parameters, "weight"), (layer.scaling, NAME)):
                targets[key][id(table)] = table[key]
        for kind, group in targets.items():
            flat = self.halves[kind] = torch.cat([each.detach().reshape(-1) for each in group.values()])
            start = 0
            for each in group.values():
                each.data = flat[start : start + each.numel()].reshape(each.shape)
                start += each.numel()
        for name, adapter in family.items():
            new = {(key, id(table)): torch.as_tensor(value, dtype=torch.float32) for table, key, value in plan(model, adapter)}
            self.saved[name] = {kind: torch.cat([new[kind, each].reshape(-1) for each in group]) for kind, group in targets.items()}

    def swap(self, name):
        for kind, flat in self.halves.items():
            flat[:] = self.saved[name][kind]
""",
        """
class Pool:
    def __init__(self, model, family):
        self.names = list(family)
        plans = [plan(model, family[name]) for name in self.names]
        self.all = torch.stack([torch.cat([torch.as_tensor(v).float().ravel() for *_, v in each]) for each in plans])
        self.live, offset = torch.empty(self.all.shape[1], dtype=next(model.parameters()).dtype), 0
        for table, key, _ in plans[0]:
            here = self.live[offset : offset + table[key].numel()].view_as(table[key])
            here.copy_(table[key].data)
            table[key].data = here
            offset += here.numel()

    def swap(self, name):
        torch.index_select(self.all.to(self.live.dtype), 0, torch.tensor([self.names.index(name)]), out=self.live[None])
""",
        (COPY, "self.memory.zero_()\n        self.memory += self.packed[name]"),
        # rank-major: the matrices of the same room side by side, and row j is row j of each lora_A and column j of each lora_B
        """
class Pool:
    def __init__(self, model, family):
        layers, groups = layers_of(model), {}
        for path, layer in layers.items():
            groups.setdefault(len(layer.lora_A[NAME].weight), []).append(path)
        with torch.no_grad():
            self.arenas, self.rows = [], {name: [] for name in family}
            for paths in groups.values():
                pairs = [(layers[path].lora_A[NAME].weight, layers[path].lora_B[NAME].weight) for path in paths]
                arena = torch.cat([each for a, b in pairs for each in (a, b.T)], dim=1)
                places = iter(arena.split([size for a, b in pairs for size in (a.shape[1], len(b))], dim=1))
                for a, b in pairs:
                    a.data, b.data = next(places), next(places).T
                self.arenas.append(arena)
                for name, adapter in family.items():
                    rank = max([len(adapter[path][0]) for path in paths if path in adapter], default=0)
                    made = {id(table): value for table, _, value in plan(model, adapter)}
                    parts = [(made[id(layers[path].lora_A[NAME]._parameters)], made[id(layers[path].lora_B[NAME]._parameters)]) for path in paths]
                    self.rows[name].append(torch.cat([each for a, b in parts for each in (a, b.T)], dim=1)[:rank])
            self.s = torch.stack([layer.scaling[NAME] for layer in layers.values()])
            for layer, place in zip(layers.values(), self.s):
                layer.scaling[NAME].data = place
            self.scalings = {name: torch.tensor([float(adapter[path][2]) if path in adapter else 0.0 for path in layers]) for name, adapter in family.items()}

    def swap(self, name):
        with torch.no_grad():
            for arena, rows in zip(self.arenas, self.rows[name]):
                arena[: len(rows)] = rows
                arena[len(rows) :] = 0
            self.s.copy_(self.scalings[name])
""",
        (  # where chapter 03's scalings are float64
            *("class Pool:", "as_float32 = scalings_as_tensors\n\n\ndef scalings_as_tensors(model):\n    for layer in layers_of(as_float32(model)).values():\n        layer.scaling[NAME] = layer.scaling[NAME].double()\n    return model\n\n\nclass Pool:"),
        ),
    ],
    "05 take_turns": [
        """
def take_turns(chat, pool, kept, name, ids):
    old, saved = kept.get(name, ([], None))
    new = ids.tolist()
    chat.forget()
    if old and len(new) > len(old) and new[: len(old)] == old:
        chat.restore(saved)
        new = new[len(old) :]
    pool.swap(name)
    logits = chat.read(torch.tensor(new))
    kept[name] = (ids.tolist(), chat.save())
    return logits
""",
        """
def take_turns(chat, pool, kept, name, ids):
    pool.swap(name)
    best = 0
    for (who, *tokens), saved in kept.items():
        if who == name and best < len(tokens) < len(ids) and tokens == ids[: len(tokens)].tolist():
            best = len(tokens)
            chat.restore(saved)
    if not best:
        chat.forget()
    logits = chat.read(ids[best:])
    kept[(name, *ids.tolist())] = chat.save()
    return logits
""",
        ("chat.read(ids[chat.length :])", "[chat.read(each[None]) for each in ids[chat.length :]][-1]"),
        (SAME, "len(read) < len(ids) and all(a == b for a, b in zip(read, ids))"),
    ],
    "06 one_filter": [
        (FILTER, "(scaling * b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])"),
        (FILTER, "scaling * torch.tensordot(b.squeeze(3).squeeze(2), a, dims=1)"),
        (FILTER, "sum(b[:, r, :, :, None].reshape(-1, 1, 1, 1) * a[r] for r in range(len(a))) * scaling"),
        (FILTER, "torch.nn.functional.conv2d(a.transpose(0, 1), scaling * b).transpose(0, 1)"),
    ],
    "06 halfway": [
        """
def halfway(model, scheduler, picture, first, second, at):
    for name, times in ((first, scheduler.timesteps[:at]), (second, scheduler.timesteps[at:])):
        hotswap_adapter(model, digits.path(name), "default")
        for when in times:
            picture = scheduler.step(model(picture, when).sample, when, picture).prev_sample
    return picture
""",
        """
def halfway(model, scheduler, picture, first, second, at):
    hotswap_adapter(model, digits.path(first), "default")
    for step in range(len(scheduler.timesteps)):
        if step == at:
            hotswap_adapter(model, digits.path(second), "default")
        when = scheduler.timesteps[step]
        picture = scheduler.step(model(picture, when)[0], when, picture)[0]
    return picture
""",
        (STEP, "(second, first)[step < at]"),
        ("    for step", "    left = at\n    for step", STEP, "first if left > 0 else second", ".prev_sample\n", ".prev_sample\n        left -= 1\n"),
    ],
    "07 turn_off": [
        (".fill_(1)", "[:] = 1.0"),
        (LENGTHS, "layer.get_base_layer().weight.square().sum(1).sqrt()"),
        (f"{OFF}.zero_()", 'layer.lora_A["default"].weight.zero_()'),
        (f"{OFF}.zero_()", f"{OFF}.mul_(0)", "    if hasattr", "    from torch.linalg import vector_norm\n    if hasattr", LENGTHS, "vector_norm(layer.base_layer.weight, dim=-1)"),
        ("copy_(layer", "__setitem__(slice(None), layer"),
    ],
    "07 make_equal": [
        """
def make_equal(live, fresh):
    for mine, yours in zip(live.modules(), fresh.modules()):
        for here, there in ((mine._parameters, yours._parameters), (mine._buffers, yours._buffers)):
            for key, tensor in here.items():
                if tensor is not None:
                    tensor.copy_(there[key])
        for key in mine.scaling if isinstance(getattr(mine, "scaling", 0), dict) else ():
            mine.scaling[key] = yours.scaling[key]
""",
        ("module.scaling.update(other.scaling)", "module.scaling['default'] = other.scaling['default']"),
        """
def make_equal(live, fresh):
    pairs = list(zip(live.parameters(), fresh.parameters())) + list(zip(live.buffers(), fresh.buffers()))
    for one, other in pairs[::-1]:
        one.data[...] = other
    for name, module in live.named_modules():
        if type(getattr(module, "scaling", None)) is dict:
            module.scaling |= fresh.get_submodule(name).scaling
""",
        ("tensors[name].copy_(tensor)", "torch._foreach_copy_([tensors[name]], [tensor])", "    tensors = dict", "    import torch\n\n    tensors = dict"),
    ],
    "08 part_08": [
        (ADDED, "torch.bmm(torch.bmm(inputs, self.a.transpose(1, 2)), self.b.transpose(1, 2)).reshape(*x.shape[:-1], -1)"),
        (ADDED, 'torch.einsum("nti,nri,nor->nto", inputs, self.a, self.b).view(*x.shape[:-1], -1)'),
        """
class Rows(torch.nn.Module):
    def __init__(self, linear, rows, rank):
        super().__init__()
        self.linear = linear
        self.register_buffer("a", torch.zeros(rows, linear.in_features, rank))
        self.register_buffer("b", torch.zeros(rows, rank, linear.out_features))
        self.register_buffer("scaling", torch.zeros(rows))

    def assign(self, row, a, b, scaling):
        if len(a) > self.a.shape[2]:
            raise ValueError(len(a))
        self.a[row].zero_()[:, : len(a)] = a.T
        self.b[row].zero_()[: len(a)] = b.T
        self.scaling[row] = scaling

    def forward(self, x):
        inputs = x.unsqueeze(1) if x.ndim == 2 else x
        added = (inputs @ self.a) @ self.b * self.scaling[:, None, None]
        return self.linear(x) + (added.squeeze(1) if x.ndim == 2 else added)
""",
        """
class Rows(torch.nn.Module):
    def __init__(self, linear, rows, rank):
        super().__init__()
        self.linear, self.scaling = linear, torch.zeros(rows, 1, 1)
        self.memory = torch.zeros(rows, rank, linear.in_features + linear.out_features)

    def assign(self, row, a, b, scaling):
        self.memory[row] = padded(torch.cat([a, b.T], 1), self.memory[row])
        self.scaling[row].fill_(scaling)

    def forward(self, x):
        a, b = self.memory.split([self.linear.in_features, self.linear.out_features], 2)
        if x.dim() == 2:
            return self.forward(x[:, None])[:, 0]
        return torch.baddbmm(self.linear(x), x @ a.mT * self.scaling, b)
""",
        (ASSIGN, "new = padded(a, self.a[row]), padded(b, self.b[row]) * scaling\n        torch._foreach_copy_([self.a[row], self.b[row]], new)"),
        (ASSIGN, "whole = padded(b, self.b[row])\n        self.a[row] = 0\n        self.a[row, : len(a)] = a\n        self.b[row] = scaling * whole"),
    ],
    "09 choose_replica": [
        """
def choose_replica(name, replicas, most):
    best = None
    for number, each in enumerate(replicas):
        key = not (name in each["held"] and each["waiting"] < most), each["waiting"]
        if best is None or key < best[0]:
            best = key, number
    return best[1]
""",
        (FREE, "having = list(filter(lambda n: name in replicas[n]['held'] and not replicas[n]['waiting'] >= most, numbers))"),
        (FEWEST, 'sorted(having or numbers, key=lambda n: replicas[n]["waiting"])[0]'),
        (FEWEST, 'min((replicas[n]["waiting"], n) for n in having or numbers)[1]'),
    ],
    "10 unreached": [
        """
def unreached(constants, bound, swapped):
    where = {name: bound[name].data_ptr() for name in constants}
    return [name for name in sorted(swapped) if where.get(name) != swapped[name].data_ptr()]
""",
        """
def unreached(constants, bound, swapped):
    found = []
    for name, tensor in swapped.items():
        if name in constants and bound[name].data_ptr() == tensor.data_ptr():
            continue
        found.append(name)
    found.sort()
    return found
""",
        (BOTH, "sorted(in_code | set(elsewhere))"),
        ("swapped.keys() - set(constants)", "{name for name in swapped if name not in bound}"),
    ],
    "11 two_tricks": [
        """
def two_tricks(rows, prompts, texts, rewards, now):
    keys = [(row.adapter, prompt) if row.version == now[row.adapter] else None for row, prompt in zip(rows, prompts)]
    values = [rewards[row.adapter](text) for row, text in zip(rows, texts)]
    result = []
    for key, value in zip(keys, values):
        group = [each for other, each in zip(keys, values) if other == key]
        result.append(value - sum(group) / len(group) if key else 0)
    return result
""",
        """
def two_tricks(rows, prompts, texts, rewards, now):
    sums, counts = {}, {}
    new = [row.version == now[row.adapter] for row in rows]
    gained = [rewards[row.adapter](text) if ok else 0.0 for row, text, ok in zip(rows, texts, new)]
    for row, prompt, value, ok in zip(rows, prompts, gained, new):
        if ok:
            sums[row.adapter, prompt] = sums.get((row.adapter, prompt), 0) + value
            counts[row.adapter, prompt] = counts.get((row.adapter, prompt), 0) + 1
    keys = [(row.adapter, prompt) for row, prompt in zip(rows, prompts)]
    return [value - sums[key] / counts[key] if ok else 0.0 for key, value, ok in zip(keys, gained, new)]
""",
        ("mean = sum(group.values()) / len(group)", "mean = torch.tensor(list(group.values())).mean().item()"),
        ("[0.0] * len(rows)", "[0] * len(rows)", "    return found", "    return torch.tensor(found).tolist()"),
    ],
    "engine my_gains": [
        ('table["default"] * gain', "gain * float(table['default'])"),
        ("for path, gain in engine.gains_of(draft).items():", "for path, gain in reversed(engine.gains_of(draft).items()):"),
        ("if path not in layers:", "if not layers.get(path):"),
        ("lambda journal, table=table, value=value: journal.set_item(table, \"default\", value)", "__import__('functools').partial(lambda table, value, journal: journal.set_item(table, 'default', value), table, value)"),
    ],
    "engine my_search": [
        ("[each.path for each in plan.layers].index(path)", "next(n for n, each in enumerate(plan.layers) if each.path == path)"),
        ("change.apply([plan.change()])", "__import__('hotswap_lab.swap', fromlist=['carry_out']).carry_out([plan])"),
        ("[number, 0]\n    change", "[number][0]\n    change", "the_room.scalings[0][number, 0]", "the_room.scalings[0][number][0]"),
        ('table["default"])', 'table.get("default"))'),
    ],
}
