// What is wrong with a page for those who do not see it as it was meant: names, headings, contrast, sizes, width.
() => {
    const wrong = [];
    const seen = (element) => element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length;
    const ids = [...document.querySelectorAll("[id]")].map(({ id }) => id);
    wrong.push(...ids.filter((id, place) => ids.indexOf(id) !== place).map((id) => `two elements are #${id}`));
    for (const control of document.querySelectorAll("input:not([type=hidden]), select, textarea")) {
        if (!control.labels.length && !control.ariaLabel) wrong.push(`#${control.id} has no label`);
    }
    for (const button of document.querySelectorAll("button")) {
        if (!button.ariaLabel && !button.textContent.trim()) wrong.push("a button has no name");
    }
    for (const region of document.querySelectorAll("section, [role=region], [role=group]")) {
        const by = document.getElementById(region.getAttribute("aria-labelledby") ?? "");
        if (!region.ariaLabel && !by?.textContent) wrong.push(`a ${region.tagName} has no name`);
    }
    for (const attribute of ["aria-labelledby", "aria-describedby", "for"]) {
        for (const element of document.querySelectorAll(`[${attribute}]`)) {
            if (!document.getElementById(element.getAttribute(attribute))) wrong.push(`${attribute} names nothing`);
        }
    }
    const levels = [...document.querySelectorAll("h1, h2, h3, h4")].filter(seen).map(({ tagName }) => +tagName[1]);
    if (levels.filter((level) => level === 1).length !== 1) wrong.push("there must be one h1");
    levels.forEach((level, place) => { if (level > (levels[place - 1] ?? 0) + 1) wrong.push("a heading is skipped"); });
    if (!document.documentElement.lang || !document.title) wrong.push("no language or no title");
    const rgb = (color) => color.match(/[\d.]+/g).map(Number);
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const color = rgb(getComputedStyle(e).backgroundColor);
            if (color.length < 4 || color[3] === 1) return color;
        }
        return [255, 255, 255];
    };
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!(own || element.matches("input, select")) || !seen(element)) continue;
        const style = getComputedStyle(element);
        const [a, b] = [light(rgb(style.color)), light(behind(element))].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        const large = parseFloat(style.fontSize) >= 24;
        if (ratio < (large ? 3 : 4.5)) wrong.push(`${element.tagName}.${element.className} has contrast ${ratio.toFixed(2)}`);
    }
    for (const control of document.querySelectorAll("button, select, input, summary")) {
        const box = control.getBoundingClientRect();
        if (seen(control) && control.type !== "checkbox" && box.height < 24) wrong.push(`${control.tagName} is ${box.height} px high`);
    }
    if (document.documentElement.scrollWidth > innerWidth) wrong.push(`it is ${document.documentElement.scrollWidth} px wide`);
    return wrong;
}
