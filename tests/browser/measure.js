// What the tests of pages measure: each function is called in the page with `return measure.<name>(...)`.
window.measure = {
  // Elements that reach past the page's right edge (a phone's innerWidth grows with what is too wide) and aren't in a box that scrolls by itself,
  // and paragraphs, headings and names whose text reaches past their own box, over what is beside it.
  tooWide(width) {
    const past = [...document.body.querySelectorAll("*")].filter(e => !e.closest(".scroll, pre") && e.getBoundingClientRect().right > width + 1);
    const page = document.documentElement.scrollWidth > width ? ["the page: " + document.documentElement.scrollWidth] : [];
    past.push(...[...document.querySelectorAll("p, li, h1, h2, h3, summary, dt, dd")].filter(e => e.scrollWidth > e.clientWidth + 1));
    return [...page, ...past.map(e => e.outerHTML.slice(0, 100))];
  },
  // [contrast, text, its colour, its ground] of every visible text whose contrast is below `least` (WCAG 2.2).
  pale(least) {
    const channels = colour => { const found = colour.match(/[\d.]+/g).map(Number); return [...found.slice(0, 3), found.length > 3 ? found[3] : 1]; };
    const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]));
    const light = rgb => { const [r, g, b] = rgb.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const ground = e => { const layers = []; for (; e; e = e.parentElement) { layers.push(channels(getComputedStyle(e).backgroundColor)); if (layers.at(-1)[3] === 1) break; }
      return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]); };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
    for (let node; (node = texts.nextNode());) {
      const e = node.parentElement;
      if (!node.data.trim() || e.closest("script, style, noscript, option, :disabled") || !e.checkVisibility({ visibilityProperty: true })) continue;
      const under = ground(e), colour = over(channels(getComputedStyle(e)[e instanceof SVGElement ? "fill" : "color"]), under), [a, b] = [light(colour), light(under)].sort((x, y) => y - x);
      this.texts = (this.texts || 0) + 1;
      if ((a + 0.05) / (b + 0.05) < least) found.push([((a + 0.05) / (b + 0.05)).toFixed(2), node.data.trim().slice(0, 40), String(colour), String(under)]);
    }
    return found;
  },
  // Numbers of texts of each figure, and boxes of two texts that overlap.
  labels() {
    return [...document.querySelectorAll("figure img")].map(image => {
      const box = document.createElement("div"), bytes = Uint8Array.from(atob(image.src.split(",")[1]), c => c.charCodeAt(0));
      box.innerHTML = new TextDecoder().decode(bytes).replace(/^[^]*?<svg/, "<svg"); document.body.append(box);
      const texts = [...box.querySelectorAll("g[id^=text_]")].map(g => g.getBoundingClientRect()).filter(r => r.width), clashes = [];
      texts.forEach((a, i) => texts.slice(0, i).forEach((b, j) => {
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1) clashes.push([j, i, a.left, a.top]); }));
      box.remove(); return { texts: texts.length, clashes };
    });
  },
  // Where the names of a table's rows stand once it was scrolled.
  leftOfNames(by) {
    const box = document.querySelector(".scroll"); box.scrollLeft = by;
    return box.querySelector("tbody tr > *").getBoundingClientRect().left;
  },
  // The first table's numbers of a column, from top to bottom, and its headers' aria-sort.
  column(place) { return [...document.querySelector("table").tBodies[0].rows].map(r => parseFloat(r.cells[place].firstChild.textContent)).filter(v => !isNaN(v)); },
  sorts() { return [...document.querySelectorAll("table")[0].querySelectorAll("th[scope=col]")].map(h => h.getAttribute("aria-sort")); },
  // As a reader chooses an option.
  choose(id, value) { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event("change", { bubbles: true })); },
};
