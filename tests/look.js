// What a reader sees of a notebook in JupyterLab, asked in the page. One object of functions.
(() => {
  const GRAPHIC = 'svg, canvas, mjx-container, .jp-icon3, script, style';
  // JupyterLab shows an error with its traceback as it shows what was written to stderr.
  const FAILED = '[data-mime-type$=".stderr"], [data-mime-type$=".error"]';
  const panel = () => document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)');
  const all = (selector, root = panel()) => [...root.querySelectorAll(selector)];
  const outputs = () => all('.jp-OutputArea-output');
  const words = (element) => JSON.stringify(element.textContent.trim().replace(/\s+/g, ' ').slice(0, 60));
  const visible = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true });

  // -- colours: those that were computed, one upon the other

  const colour = (text) => {
    const parts = text.match(/[\d.]+/g).map(Number);
    return text.startsWith('color(srgb') ? parts.map((p, i) => (i < 3 ? p * 255 : p)) : parts;
  };
  const over = ([r, g, b, a = 1], ground) => [r, g, b].map((part, i) => a * part + (1 - a) * ground[i]);
  const ground = (element) => {
    if (!element) return [255, 255, 255];
    const own = colour(getComputedStyle(element).backgroundColor);
    return own.length < 4 || own[3] === 1 ? own.slice(0, 3) : over(own, ground(element.parentElement));
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };

  // -- texts: each with its rectangles on the page

  const texts = (root) => {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    const found = [];
    while (walker.nextNode()) {
      const node = walker.currentNode;
      const parent = node.parentElement;
      if (!node.data.trim() || parent.closest(GRAPHIC) || parent.closest('select') || !visible(parent)) continue;
      const range = document.createRange();
      range.selectNodeContents(node);
      found.push({ node, parent, boxes: [...range.getClientRects()].filter((box) => box.width > 1) });
    }
    return found;
  };

  const faint = (root) => {
    const found = [];
    for (const { node, parent } of texts(root)) {
      const style = getComputedStyle(parent);
      const size = parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700); // WCAG 2.2, 1.4.3
      const behind = ground(parent);
      const ratio = contrast(over(colour(style.color), behind), behind);
      if (ratio < (large ? 3 : 4.5)) found.push(`contrast ${ratio.toFixed(1)}:1: ${JSON.stringify(node.data.trim().slice(0, 60))}`);
    }
    return found;
  };

  const piled = (root) => {
    const boxes = texts(root).flatMap(({ node, boxes }) => boxes.map((box) => ({ node, box })));
    const found = [];
    boxes.forEach((one, place) => {
      for (const other of boxes.slice(place + 1)) {
        if (one.node === other.node) continue;
        const wide = Math.min(one.box.right, other.box.right) - Math.max(one.box.left, other.box.left);
        const high = Math.min(one.box.bottom, other.box.bottom) - Math.max(one.box.top, other.box.top);
        if (wide > 2 && high > 0.4 * Math.min(one.box.height, other.box.height)) {
          found.push(`text over text: ${JSON.stringify(one.node.data.trim().slice(0, 30))}, ${JSON.stringify(other.node.data.trim().slice(0, 30))}`);
        }
      }
    });
    return found;
  };

  // What is wider than the place it has: the reader sees a part, or has to scroll sideways. A part of a
  // slider, which has no words, may be wider.
  const clipped = (root) =>
    [root, ...all('*', root)]
      .filter((e) => !e.closest(GRAPHIC) && visible(e) && e.textContent.trim() && e.clientWidth && e.scrollWidth > e.clientWidth + 1)
      .filter((e) => getComputedStyle(e).overflowX !== 'visible')
      .map((e) => `clipped: ${e.scrollWidth} pixels in ${e.clientWidth}: ${words(e)}`);

  const pictures = (root) =>
    all('img', root).flatMap((image) => {
      const found = [];
      if (!image.complete || !image.naturalWidth) found.push('a picture is broken');
      if ((image.alt || '').length < 20) found.push('a picture has no alternative text');
      // Figures have twice the pixels of their width, for sharp screens: shown at that width they are whole.
      const given = Number(image.getAttribute('width'));
      const share = image.clientWidth / (given ? Math.max(given, image.naturalWidth / 2) : image.naturalWidth);
      if (share < 0.8) found.push(`a picture is shrunk to ${Math.round(100 * share)} %`);
      return found;
    });

  return {
    // Whether prose, formulas, pictures and controls have all arrived.
    drawn: (cells) =>
      all('.jp-Cell').length === cells &&
      all('img').every((image) => image.complete) &&
      all('.jp-MarkdownOutput').every((cell) => cell.textContent.trim() && !/\$\$|\\text\{/.test(cell.innerText)) &&
      !/Loading widget/.test(panel().textContent),

    // Whether Run All has come to its end: a number at every cell, or an error and nothing waiting.
    ran: (cells) => {
      const prompts = all('.jp-CodeCell .jp-InputPrompt').map((prompt) => prompt.textContent.trim());
      const failed = all(FAILED).length > 0;
      if (all('.jp-Cell').length !== cells) return false;
      return prompts.every((text) => /^\[\d+\]:$/.test(text)) || (failed && !prompts.includes('[*]:'));
    },

    lightness: () => luminance(ground(outputs()[0])),

    problems: (raw) => {
      const found = [];
      for (const output of outputs()) {
        if (output.matches(FAILED)) found.push(`failed or complained: ${words(output)}`);
        for (const formula of all('mjx-container', output)) found.push(`set as a formula: ${words(formula)}`);
        if (new RegExp(raw).test(output.innerText)) found.push(`raw: ${words(output)}`);
        found.push(...clipped(output), ...faint(output), ...piled(output), ...pictures(output));
      }
      for (const prose of all('.jp-MarkdownOutput')) found.push(...clipped(prose), ...faint(prose), ...pictures(prose));
      return found;
    },
  };
})()
