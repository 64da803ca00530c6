// Draws the figures of a report page, and answers its switches, menus and sliders. All of them are the browser's own, so
// that the keyboard works as it does everywhere.
(async () => {
  "use strict";
  if (!("DecompressionStream" in window)) {
    for (const plot of document.querySelectorAll(".plot")) plot.textContent = "Figures need a browser of 2023 or later.";
    return;
  }

  // Figures and plotly lie in the page compressed, as base64 of gzip.
  async function unpack(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }
  const drawings = JSON.parse(await unpack("drawings"));
  // The policy of the page allows a script with plotly's hash and no other.
  const plotly = document.createElement("script");
  plotly.textContent = await unpack("plotly");
  document.head.append(plotly);
  plotly.remove();
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
      const part = input.closest("[data-part]");
      for (const entry of part.querySelectorAll(`[data-legend="${input.dataset.recipe}"]`)) entry.hidden = !input.checked;
      for (const plot of part.querySelectorAll(".plot")) {
        const traces = drawings[plot.id].data.flatMap((trace, index) => (trace.legendgroup === input.dataset.recipe ? [index] : []));
        if (traces.length) Plotly.restyle(plot, { visible: input.checked }, traces);
      }
    });
  }

  // What a figure shows by its menus and sliders, whose values are places in their lists of options.
  const controls = (id) => [...document.querySelectorAll(`[data-choice="${id}"]`)];
  const nothing = { text: "not measured", xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false };
  const place = (control) => (control.type === "range" ? Number(control.value) : control.selectedIndex);

  function choose(id) {
    const { options, frames, places, axes, tabled } = drawings[id].choices;
    const chosen = controls(id).map(place);
    const words = chosen.map((index, control) => options[control][index]);
    for (const [index, control] of controls(id).entries()) {
      if (control.type !== "range") continue;
      control.setAttribute("aria-valuetext", words[index]);
      control.nextElementSibling.textContent = words[index];
    }
    const frame = frames[chosen.join("-")];
    const curves = frame?.curves ?? drawings[id].data.map(() => null);
    const known = curves.some(Boolean);
    box(`${id}-chosen`).textContent = words.join(", ") + (known ? "" : ": not measured");
    const x = curves.map((curve) => (curve ? places[curve[0]] : []));
    const y = curves.map((curve) => (curve ? curve[1] : []));
    const axis = frame ? Object.entries(axes[frame.axis]).map(([key, value]) => [`yaxis.${key}`, value]) : [];
    Plotly.update(box(id), { x, y }, { ...Object.fromEntries(axis), annotations: known ? [] : [nothing] });
    const rows = [...new Set(x.slice(0, tabled).flat())].sort((one, two) => one - two);
    box(`${id}-numbers-table`).tBodies[0].replaceChildren(...rows.map((at) => row(at, x.slice(0, tabled), y)));
  }

  // The numbers of all curves at one place.
  function row(at, x, y) {
    const line = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = at;
    const cells = x.map((column, index) => {
      const value = y[index][column.indexOf(at)];
      const cell = document.createElement("td");
      cell.textContent = value == null ? "-" : Number(value.toPrecision(3));
      return cell;
    });
    line.append(head, ...cells);
    return line;
  }

  for (const control of document.querySelectorAll("[data-choice]")) {
    control.addEventListener("input", () => choose(control.dataset.choice));
  }

  // A browser keeps inputs over a reload; the figures begin anew.
  for (const input of document.querySelectorAll("input[data-recipe], input[data-for]")) input.checked = input.defaultChecked;
  for (const input of document.querySelectorAll("input[data-choice]")) input.value = input.defaultValue;

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

  // Paper is narrower than most screens: A4 and Letter both hold this width, or two small figures.
  const paper = 660;
  const column = 314;
  const sliders = [...document.querySelectorAll("input[data-choice]")];
  // A slider stands at its end on paper.
  const slide = (value) => {
    for (const slider of sliders) {
      slider.value = value(slider);
      choose(slider.dataset.choice);
    }
  };
  let before;
  addEventListener("beforeprint", () => {
    before = new Map(sliders.map((slider) => [slider, slider.value]));
    slide((slider) => slider.max);
    for (const id of Object.keys(drawings)) Plotly.relayout(box(id), { width: box(id).closest(".pair") ? column : paper });
  });
  addEventListener("afterprint", () => {
    slide((slider) => before.get(slider));
    for (const id of Object.keys(drawings)) Plotly.relayout(box(id), { width: null, autosize: true });
  });
})();
