// Attributes and keys that ipywidgets can't set. It runs in an attribute of an image: no double quotes.
setTimeout(() => {
  const root = this.closest('.hotswap-live');
  if (!root) return;
  const all = selector => [...root.querySelectorAll(selector)];
  // a slider's handle and number have the label next to them as their name for screen readers
  const label = each => each.closest('.jupyter-widgets').querySelector('label').textContent;
  all('.noUi-handle').forEach(each => each.setAttribute('aria-label', label(each)));
  all('.widget-readout').forEach(each => each.setAttribute('aria-label', label(each) + ', as a number'));
  // Text that changes by itself is read out. The attribute is on a permanent element: content is replaced each time.
  all('.hotswap-says').forEach(each => each.setAttribute('aria-live', 'polite'));
  // the notebook leaves keys pressed in here to the controls, while Notebook 7 would use arrow keys
  root.addEventListener('focusin', ({target}) => target.matches('.noUi-handle, button, select, .hotswap-tile') &&
    target.setAttribute('data-lm-suppress-shortcuts', 'true'));
  // toggle buttons are a radio group: one place for Tab
  const mark = () => all('.hotswap-choices').forEach(group => {
    const radios = [...group.querySelectorAll('button')], chosen = radios.find(each => each.matches('.mod-active'));
    group.setAttribute('role', 'radiogroup');
    group.setAttribute('aria-label', 'adapter');
    radios.forEach(each => {
      each.setAttribute('role', 'radio');
      each.setAttribute('aria-checked', each === chosen);
      each.tabIndex = each === (chosen ?? radios[0]) ? 0 : -1;
    });
  });
  mark();
  new MutationObserver(mark).observe(root, {subtree: true, childList: true, attributeFilter: ['class']});
  // arrow keys choose among radios, and go from tile to tile
  root.addEventListener('keydown', event => {
    const step = {ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1}[event.key];
    const kind = ['.hotswap-choices button', '.hotswap-tile'].find(each => event.target.matches(each));
    if (!step || !kind) return;
    const group = [...event.target.parentElement.children].filter(each => each.matches(kind));
    const next = group.at((group.indexOf(event.target) + step) % group.length);
    event.preventDefault();
    event.stopPropagation();
    next.focus();
    next.click?.();
  });
}, 300)
