// Returns [text, contrast] of every visible text of the page, as in WCAG 2.2.
() => {
  const parts = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const over = ([r, g, b, a = 1], below) =>
    [r, g, b].map((value, index) => value * a + below[index] * (1 - a));
  const ancestors = (element) => {
    const found = [];
    for (let one = element; one; one = one.parentElement) found.unshift(one);
    return found;
  };
  const background = (element) =>
    ancestors(element)
      .map((one) => parts(getComputedStyle(one).backgroundColor))
      .reduce((below, colour) => over(colour, below), [255, 255, 255]);
  const opacity = (element) =>
    ancestors(element).reduce((all, one) => all * getComputedStyle(one).opacity, 1);
  const luminance = (colour) => {
    const [r, g, b] = colour.map((value) => {
      value /= 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (element, colour) => {
    const below = background(element);
    const [r, g, b, a = 1] = parts(colour);
    const text = over([r, g, b, a * opacity(element)], below);
    const [dark, light] = [luminance(text), luminance(below)].sort((one, other) => one - other);
    return (light + 0.05) / (dark + 0.05);
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const isVisible = element.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });
    if (!isVisible || element.closest(":disabled, [aria-hidden=true], svg")) continue;
    const own = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
    const written = element.matches("textarea, input:not([type]), input[type=text], input[type=number]");
    const text = written ? element.value : own.map((node) => node.data.trim()).join(" ").trim();
    const push = (shown, pseudo) =>
      found.push([shown.slice(0, 60), contrast(element, getComputedStyle(element, pseudo).color)]);
    if (text) push(text);
    if (element.placeholder && !element.value) push(element.placeholder, "::placeholder");
  }
  return found;
}
