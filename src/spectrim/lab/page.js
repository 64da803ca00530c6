// Draws the figures of a report page, and answers its switches. Every switch is a checkbox, so that the keyboard works
// as it does everywhere.
(() => {
  "use strict";
  const drawings = JSON.parse(document.getElementById("drawings").textContent);
  // On a touch screen a drag scrolls the page instead of zooming.
  const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
  const settings = { displayModeBar: false, responsive: true, showTips: false };

  const box = (id) => document.getElementById(id);
  const find = (name, id) => document.querySelector(`input[data-for="${id}"][${name}]`);
  const isOn = (name, id) => Boolean(find(name, id)?.checked);

  // Plotly writes the digits between powers of ten without their power.
  function ticks(log) {
    if (!log) return { "xaxis.tickmode": "auto", "xaxis.tickvals": null, "xaxis.ticktext": null };
    const write = new Intl.NumberFormat("en", { notation: "compact" });
    // As on the linear axis, where thousand is a small k.
    const label = (place) => write.format(place).replace("K", "k");
    const places = Array.from({ length: 21 }, (_, power) => [1, 2, 5].map((digit) => Number(`${digit}e${power - 3}`))).flat();
    return { "xaxis.tickmode": "array", "xaxis.tickvals": places, "xaxis.ticktext": places.map(label) };
  }

  // Ranges of a logarithmic axis are in powers of ten; a range of null is the whole one.
  function view(id) {
    const { closeUp, layout } = drawings[id];
    const change = {};
    for (const axis of ["x", "y"]) {
      if (!find(`data-scale="${axis}"`, id) && !(axis === "y" && closeUp)) continue;
      const scaled = Boolean(find(`data-scale="${axis}"`, id));
      const log = scaled ? isOn(`data-scale="${axis}"`, id) : layout[`${axis}axis`].type === "log";
      change[`${axis}axis.type`] = log ? "log" : "linear";
      if (axis === "x") Object.assign(change, ticks(log));
      const near = axis === "y" && closeUp && !isOn("data-whole", id);
      change[`${axis}axis.autorange`] = !near;
      if (near) change[`${axis}axis.range`] = closeUp.map((end) => (log ? Math.log10(end) : end));
    }
    return change;
  }

  for (const id of Object.keys(drawings)) {
    const { data, layout, height } = drawings[id];
    Plotly.newPlot(box(id), data, { ...layout, dragmode, height }, settings).then(() => Plotly.relayout(box(id), view(id)));
  }

  for (const input of document.querySelectorAll("input[data-for]")) {
    input.addEventListener("change", () => Plotly.relayout(box(input.dataset.for), view(input.dataset.for)));
  }

  for (const input of document.querySelectorAll("input[data-recipe]")) {
    input.addEventListener("change", () => {
      for (const plot of input.closest("[data-part]").querySelectorAll(".plot")) {
        const traces = drawings[plot.id].data.flatMap((trace, index) => (trace.legendgroup === input.dataset.recipe ? [index] : []));
        if (traces.length) Plotly.restyle(plot, { visible: input.checked }, traces);
      }
    });
  }

  // A browser keeps checkboxes over a reload; the figures begin anew.
  for (const input of document.querySelectorAll("input[data-recipe], input[data-for]")) input.checked = input.defaultChecked;

  if (navigator.clipboard) {
    for (const button of document.querySelectorAll("button[data-copy]")) {
      button.hidden = false;
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(box(button.dataset.copy).textContent);
        button.textContent = "Copied";
        setTimeout(() => (button.textContent = "Copy"), 1500);
      });
    }
  }

  // Paper is narrower than most screens: A4 and Letter both hold this width.
  const paper = 660;
  addEventListener("beforeprint", () => {
    for (const id of Object.keys(drawings)) Plotly.relayout(box(id), { width: paper });
  });
  addEventListener("afterprint", () => {
    for (const id of Object.keys(drawings)) Plotly.relayout(box(id), { width: null, autosize: true });
  });
})();
