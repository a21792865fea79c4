"use strict";
// The views that open on demand: the list of cases, and one case. Everything is built as nodes; text stays text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const cases = data.cases;
  const byId = new Map(cases.map((entry, index) => [entry.id, index]));
  const views = Object.fromEntries(["overview", "cases", "case"].map((name) => [name, document.getElementById(name + "-view")]));
  const PAGE = 150;

  // Nodes.
  const fill = (node, attributes, children) => {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== "") node.append(child);
    return node;
  };
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  const chip = (state) => h("span", { class: "chip " + String(state).replaceAll(" ", "-") }, String(state));
  const num = (value) => typeof value === "number";
  const margin = (value) => {
    if (!num(value)) return "–";
    if (value >= 1e9) return "∞";
    return value < 100 ? value.toFixed(2) : value < 1e6 ? Math.round(value).toLocaleString("en") : value.toExponential(1);
  };
  const figure = (value) => {
    if (value === null || value === undefined) return "–";
    if (value === true || value === false) return value ? "yes" : "no";
    if (Array.isArray(value)) return value.map(figure).join(", ") || "–";
    if (num(value)) {
      if (Number.isInteger(value)) return value.toLocaleString("en");
      return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? String(value) : value.toExponential(2);
    }
    return typeof value === "object" ? Object.entries(value).map(([k, v]) => `${k}: ${figure(v)}`).join("; ") : String(value);
  };
  const list = (value) => (Array.isArray(value) ? value.join(", ") : figure(value));
  const duration = (s) => (s < 60 ? s.toFixed(1) + " s" : Math.floor(s / 60) + " min " + Math.round(s % 60) + " s");
  const meter = (value) =>
    num(value) &&
    svg("svg", { class: "meter" + (value > 1 ? " over" : ""), viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("rect", { class: "track", width: 100, height: 6 }),
      svg("rect", { class: "fill", width: (Math.min(value, 1.25) / 1.25) * 100, height: 6 }),
      svg("rect", { class: "bound", x: 79.4, width: 1.2, height: 6 }));
  const table = (kind, caption, head, rows) =>
    h("div", { class: "scroll" },
      h("table", { class: kind }, caption && h("caption", {}, caption),
        h("thead", {}, h("tr", {}, head.map((text, i) => h("th", { scope: "col", class: i && !kind.startsWith("gates") ? "n" : null }, text)))),
        h("tbody", {}, rows)));
  const caseLink = (id) => "#case=" + encodeURIComponent(id).replaceAll("%2F", "/").replaceAll("%2B", "+");
  const casesLink = (parameters) => "#cases?" + new URLSearchParams(parameters);

  // The list of cases.
  const SORTS = {
    run: ["as they ran", null],
    margin: ["largest margin", (a, b) => (b.margin ?? -1) - (a.margin ?? -1)],
    seconds: ["longest", (a, b) => (b.seconds ?? -1) - (a.seconds ?? -1)],
  };
  const FIELDS = ["verdict", "mode", "transport", "format"];

  const chosen = (query) => {
    const words = (query.get("q") || "").toLowerCase().split(/\s+/).filter(Boolean);
    const found = cases.filter((entry) =>
      FIELDS.every((field) => !query.get(field) || entry[field] === query.get(field)) &&
      words.every((word) => (entry.id + " " + (entry.reason || "")).toLowerCase().includes(word)));
    const order = (SORTS[query.get("sort")] || SORTS.run)[1];
    return order ? [...found].sort(order) : found;
  };

  const row = (entry) =>
    h("li", {}, h("a", { href: caseLink(entry.id) }, chip(entry.verdict),
      h("span", { class: "what" }, h("code", { class: "id" }, entry.id), entry.verdict !== "pass" && entry.reason ? h("span", { class: "reason" }, entry.reason) : null),
      h("span", { class: "measure" }, meter(entry.margin) || null, h("span", { class: "margin" }, num(entry.margin) ? margin(entry.margin) : ""))));

  function showCases(query) {
    const results = h("div", {});
    const status = h("p", { class: "note", role: "status" });
    const update = (push) => {
      const found = chosen(query);
      status.textContent = found.length === cases.length ? `All ${cases.length} cases.` : `${found.length} of ${cases.length} cases.`;
      const ordered = h("ol", { class: "cases" });
      let shown = 0;
      const more = h("button", { type: "button", onclick: () => grow() });
      const grow = () => {
        ordered.append(...found.slice(shown, shown + PAGE).map(row));
        shown = Math.min(found.length, shown + PAGE);
        more.hidden = shown >= found.length;
        more.textContent = `Show ${Math.min(PAGE, found.length - shown)} more`;
      };
      grow();
      results.replaceChildren(ordered, more);
      if (push) {
        history.replaceState(null, "", casesLink(query));
        current = location.hash;
      }
    };
    const set = (name) => (event) => {
      if (event.target.value) query.set(name, event.target.value);
      else query.delete(name);
      update(true);
    };
    const select = (name, label, options) =>
      h("label", {}, label, h("select", { name, onchange: set(name) },
        options.map(([value, text]) => h("option", { value, selected: (query.get(name) || "") === value }, text))));
    const values = (field) => [["", "all"], ...[...new Set(cases.map((entry) => entry[field]))].map((value) => [value, value])];
    update(false);
    views.cases.replaceChildren(
      h("p", { class: "crumbs" }, h("a", { href: "#overview" }, "Overview"), h("span", {}, "› Cases")),
      h("h1", { tabindex: "-1" }, "Cases"),
      h("form", { class: "filters", onsubmit: (event) => event.preventDefault() },
        h("label", { class: "wide" }, "Words in the id or the reason", h("input", { type: "search", name: "q", value: query.get("q") || "", oninput: set("q"), autocomplete: "off", spellcheck: "false" })),
        FIELDS.map((field) => select(field, field[0].toUpperCase() + field.slice(1), values(field))),
        select("sort", "Order", Object.entries(SORTS).map(([value, [text]]) => [value === "run" ? "" : value, text]))),
      status, results);
    return "Cases";
  }

  // One case.
  const LABELS = {
    observed_over_model: "observed error over predicted", relative_frobenius: "relative error, all tokens",
    worst_token_relative: "relative error, worst token", max_abs: "largest absolute error", signed_bias: "signed bias",
    exemptions: "tokens exempt from the choice", exemptions_possible: "tokens that could be",
    exemptions_expected: "exempt tokens expected", exemptions_allowed: "exempt tokens allowed", skipped: "skipped by", not_checked: "not shown by it",
    error_ratio: "ratio of their errors", error_ratio_usual: "within 1/2 and 2", bitwise_equal: "share of equal elements",
  };
  const DRAWN = new Set(["ulps", "worst", "worst_rows", "by_rank", "by_expert", "by_rank_and_expert", "stages"]);
  const section = (title, ...content) => h("section", {}, h("h2", {}, title), content);
  const key = (index) => h("span", { class: "key series-" + (index % 4), "aria-hidden": "true" });

  function place(worst) {
    if (!worst || typeof worst !== "object") return "";
    const parts = [];
    if (num(worst.token)) parts.push("token " + worst.token + (worst.place ? ` (${worst.place})` : ""));
    if (num(worst.slot)) parts.push("choice " + worst.slot);
    if (Array.isArray(worst.experts) && worst.experts.length) parts.push("experts " + list(worst.experts));
    if (num(worst.expert)) parts.push("at expert " + worst.expert);
    if (num(worst.rank)) parts.push("on rank " + worst.rank);
    if (Array.isArray(worst.ranks) && worst.ranks.length) parts.push("on ranks " + list(worst.ranks));
    if (num(worst.column)) parts.push("column " + worst.column);
    const values = num(worst.value) ? `: ${figure(worst.value)}, expected ${figure(worst.expected)}` : "";
    return parts.join(", ") + values;
  }

  function numbers(names, frameworks) {
    const keys = [...new Set(names.flatMap((name) => Object.keys(frameworks[name])))].filter((k) => !DRAWN.has(k));
    const plain = (value) => value === null || typeof value !== "object" || Array.isArray(value);
    const shown = keys.filter((k) => names.every((name) => plain(frameworks[name][k])));
    const rows = shown.map((k) => h("tr", {}, h("th", { scope: "row" }, LABELS[k] || k), names.map((name) => h("td", { class: "n" }, figure(frameworks[name][k])))));
    return rows.length && table("numbers", "", ["", ...names], rows);
  }

  function stages(name, rows) {
    const bad = (value) => (num(value) && value > 1 ? "n over" : "n");
    const first = rows.find((entry) => entry[4] !== "ok");
    const body = rows.map(([stage, free, taught, observed, state]) =>
      h("tr", { "data-stage": stage }, h("th", { scope: "row" }, data.stages[stage] || stage), h("td", { class: bad(free) }, margin(free)),
        h("td", { class: bad(taught) }, margin(taught)), h("td", { class: "n" }, margin(observed)), h("td", { class: "n" }, chip(state))));
    const told = first ? `First to diverge: ${data.stages[first[0]] || first[0]}${first[4] === "born" ? ", where the error is born" : ""}.` : "No stage diverges.";
    const where = first && first[5] ? ` Worst: ${place(first[5])}.` : "";
    return h("div", {}, table("stages", name, ["stage", "free", "taught", "obs/pred", ""], body), h("p", { class: "note" }, told + where));
  }

  function ulps(names, frameworks) {
    const bins = [...new Set(names.flatMap((name) => Object.keys(frameworks[name].ulps || {})))];
    if (!bins.length) return null;
    const most = Math.max(...names.flatMap((name) => Object.values(frameworks[name].ulps || {})), 1);
    const label = (bin, i) => (bin === "<=inf" ? "> " + bins[i - 1].slice(2) : (i ? bins[i - 1].slice(2) + " – " : "≤ ") + bin.slice(2));
    const bars = bins.map((bin, i) => names.map((name, j) => {
      const count = (frameworks[name].ulps || {})[bin] || 0;
      const total = Object.values(frameworks[name].ulps || {}).reduce((a, b) => a + b, 0) || 1;
      const width = (Math.log10(1 + count) / Math.log10(1 + most)) * 100;
      return [h("span", { class: "bin" }, j ? "" : label(bin, i)),
        svg("svg", { viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("rect", { class: "series-" + (j % 4), width, height: 6 })),
        h("span", { class: "count" }, h("span", { class: "sr" }, name + " "), count ? `${count.toLocaleString("en")} (${((100 * count) / total).toFixed(count < total / 1000 ? 3 : 1)}%)` : "0")];
    }));
    return section("Errors in units of the last place", h("p", { class: "note" }, "Elements of the output by error, in ulps of its format; bars are logarithmic. ", names.map((name, j) => h("span", {}, key(j), name, " \u2003"))),
      h("div", { class: "ulps" }, bars));
  }

  const level = (value) => (!num(value) ? "hn" : value > 1 ? "h5" : "h" + Math.min(4, Math.floor(value * 5)));
  const scale = () => h("ul", { class: "scale" }, ["up to 0.2", "0.4", "0.6", "0.8", "1", "above: fails"].map((text, i) => h("li", {}, h("span", { class: "key h" + i }), text)));
  const heat = (title, values) => Array.isArray(values) && values.length && [h("h4", {}, title),
    h("ol", { class: "heat" }, values.map((value, i) => h("li", { class: level(value) }, h("small", {}, i), num(value) ? margin(value) : "none")))];

  function map(rows) {
    if (!Array.isArray(rows) || !rows.length) return null;
    const wide = rows[0].length;
    const cells = rows.flatMap((line, r) => line.map((value, e) =>
      svg("rect", { class: level(value), x: e + 0.04, y: r + 0.04, width: 0.92, height: 0.92 }, svg("title", {}, `DP rank ${r}, expert ${e}: ${num(value) ? margin(value) : "no tokens"}`))));
    let worst = [null, 0, 0];
    rows.forEach((line, r) => line.forEach((value, e) => { if (num(value) && !(worst[0] >= value)) worst = [value, r, e]; }));
    const drawn = svg("svg", { viewBox: `0 0 ${wide} ${rows.length}`, preserveAspectRatio: "none", role: "img", "aria-label": `Error over bound of each expert's tokens on each DP rank; the largest, ${margin(worst[0])}, for expert ${worst[2]} on DP rank ${worst[1]}` }, cells);
    drawn.style.height = `${Math.max(rows.length * 1.5, 1.5)}rem`;
    return [h("h4", {}, "By DP rank and expert"), h("div", { class: "map" },
      h("div", { class: "ranks", "aria-hidden": "true" }, rows.map((_, r) => h("span", {}, "rank " + r))), drawn,
      h("div", { class: "across", "aria-hidden": "true" }, h("span", {}, "expert 0"), h("span", {}, wide - 1))),
      h("p", { class: "note" }, `Largest: ${margin(worst[0])}, tokens of expert ${worst[2]} on DP rank ${worst[1]}.`)];
  }

  function errors(name, found) {
    const rows = found.worst_rows || [];
    const parts = [heat("By DP rank", found.by_rank), heat("By expert", found.by_expert), map(found.by_rank_and_expert)].filter(Boolean);
    if (rows.length) parts.push(table("rows", "Worst rows", ["token", "rank, row", "experts", "margin", "relative"], rows.map(([token, rank, at, experts, over, relative]) =>
      h("tr", {}, h("th", { scope: "row" }, figure(token)), h("td", { class: "n" }, `${figure(rank)}, ${figure(at)}`), h("td", { class: "n" }, list(experts)),
        h("td", { class: num(over) && over > 1 ? "n over" : "n" }, margin(over)), h("td", { class: "n" }, figure(relative))))));
    if (found.worst) parts.push(h("p", { class: "note" }, `Worst element: ${place(found.worst)}.`));
    return parts.length ? h("div", { "data-framework": name }, h("h3", {}, name), parts) : null;
  }

  function command(text) {
    const shown = h("pre", { tabindex: "0" }, h("code", {}, text));
    const button = h("button", { type: "button", "aria-label": "Copy: " + text, onclick: async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(shown);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    } }, "Copy");
    return h("div", { class: "run" }, shown, button);
  }

  function showCase(id) {
    const index = byId.get(id);
    if (index === undefined) {
      views.case.replaceChildren(h("p", { class: "crumbs" }, h("a", { href: "#overview" }, "Overview")), h("h1", { tabindex: "-1" }, "No such case"),
        h("p", { class: "callout" }, `This report has no case ${id}.`), h("p", {}, h("a", { href: "#cases" }, "All cases")));
      return "No such case";
    }
    const entry = cases[index];
    const frameworks = entry.frameworks || {};
    const names = Object.keys(frameworks);
    const cell = casesLink({ mode: entry.mode, transport: entry.transport, format: entry.format });
    const facts = (entry.words || []).map(([what, said]) => [data.texts[what], data.texts[said]]);
    const measured = [["margin", num(entry.margin) ? margin(entry.margin) : null], ["sensitivity", num((entry.rest || {}).sensitivity) ? figure(entry.rest.sensitivity) + ", allowed 0.33" : null],
      ["time", num(entry.seconds) ? duration(entry.seconds) : null], ...Object.entries(entry.rest || {}).filter(([k]) => k !== "sensitivity").map(([k, v]) => [LABELS[k] || k, figure(v)])].filter(([, v]) => v !== null);
    const definitions = (pairs) => h("dl", { class: "facts-list" }, pairs.map(([what, said]) => h("div", { class: String(said).length > 34 ? "long" : null }, h("dt", {}, what), h("dd", {}, said))));
    const [ranks, kind, log, tail] = entry.log || ["", "", "", ""];
    const staged = names.filter((name) => (frameworks[name].stages || []).length);
    const neighbour = (at, text) => (cases[at] ? h("a", { href: caseLink(cases[at].id), rel: at < index ? "prev" : "next" }, text) : h("span", {}));
    const rerun = data.options ? " " + data.options : "";
    const quoted = /^[\w@%+=:,./-]+$/.test(entry.id) ? entry.id : "'" + entry.id.replaceAll("'", "'\"'\"'") + "'";
    const places = names.map((name) => errors(name, frameworks[name])).filter(Boolean);
    const pairs = Object.entries(entry.pairs || {}).filter(([, found]) => found && typeof found === "object");

    views.case.replaceChildren(...[
      h("p", { class: "crumbs" }, h("a", { href: "#overview" }, "Overview"), h("span", {}, "› ", h("a", { href: cell }, `${entry.mode}, ${entry.transport}, ${entry.format}`))),
      h("div", { class: "title" }, h("h1", { tabindex: "-1" }, entry.id), chip(entry.verdict)),
      entry.reason ? h("p", { class: "callout " + entry.verdict }, entry.reason) : null,
      measured.length ? definitions(measured) : null,
      (entry.failed || []).length ? section("Failed gates", table("gates stack", "", ["gate", "framework", "margin", "what"], entry.failed.map((gate) =>
        h("tr", {}, h("th", { scope: "row" }, figure(gate.gate)), h("td", { "data-label": "in" }, figure(gate.framework)), h("td", { "data-label": "margin" }, margin(gate.margin)), h("td", { class: "id" }, figure(gate.detail)))))) : null,
      staged.length ? section("Stages", h("p", { class: "note" }, "Error over bound of each stage: free, as the layer ran, and taught, fed the oracle's own inputs. A stage that fails when taught is where an error is born; one that fails only free received it. obs/pred: observed error over the predicted one."),
        h("div", { class: "columns" }, staged.map((name) => stages(name, frameworks[name].stages)))) : null,
      kind || tail ? section("What happened", definitions([["who", ranks], ["how", kind], ["log", log]].filter(([, v]) => v)), tail ? [h("h3", {}, "End of the log"), h("pre", { tabindex: "0" }, tail)] : null) : null,
      names.length ? section("Numbers", h("div", { class: "columns" }, numbers(names, frameworks) || null,
        pairs.length ? h("div", {}, pairs.map(([name, found]) => table("numbers", "", [name, ""], Object.entries(found).map(([k, v]) => h("tr", {}, h("th", { scope: "row" }, LABELS[k] || k), h("td", { class: "n" }, figure(v))))))) : null)) : null,
      names.length ? ulps(names, frameworks) : null,
      places.length ? section("Where the error is", h("p", { class: "note" }, "Error over bound of the tokens of each DP rank, and of those that use each expert, together."), scale(), h("div", { class: "columns" }, places)) : null,
      facts.length ? section("The case in words", h("dl", { class: "words" }, facts.map(([what, said]) => [h("dt", {}, what), h("dd", {}, said)]))) : null,
      section("Run it again", command("parity run " + quoted + rerun), command("parity explain " + quoted + rerun)),
      h("nav", { class: "pager", "aria-label": "Neighbouring cases" }, neighbour(index - 1, "‹ previous case"), neighbour(index + 1, "next case ›")),
    ].filter(Boolean));
    return entry.id;
  }

  // State is in the fragment: #overview, #cases?verdict=fail&q=words, #case=ID, or a section of the overview.
  let current = location.hash;
  const scrolls = new Map();
  const decoded = (text) => { try { return decodeURIComponent(text); } catch { return text; } };

  function show(first) {
    const hash = location.hash;
    let name = "overview", title = "";
    if (hash.startsWith("#case=")) [name, title] = ["case", showCase(decoded(hash.slice(6)))];
    else if (/^#cases($|\?)/.test(hash)) [name, title] = ["cases", showCases(new URLSearchParams(hash.slice(7)))];
    for (const [view, node] of Object.entries(views)) node.hidden = view !== name;
    for (const link of document.querySelectorAll(".top nav a")) {
      const here = link.hash === "#" + name || (link.hash === "#overview" && name === "overview");
      if (here) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    document.title = (title ? title + " – " : "") + heading;
    const target = name === "overview" && hash.length > 1 && document.getElementById(decoded(hash.slice(1)));
    if (target && hash !== "#overview") target.scrollIntoView();
    else if (!first) scrollTo(0, name === "case" ? 0 : scrolls.get(hash) || 0);
    document.documentElement.dataset.shown = hash; // what is on the screen, now that it is
    if (!first || name !== "overview") (views[name].querySelector("h1") || views[name]).focus({ preventScroll: true });
  }

  const heading = document.title;
  document.getElementById("lead-title").tabIndex = -1;
  addEventListener("hashchange", () => {
    scrolls.set(current, scrollY);
    current = location.hash;
    show(false);
  });
  show(true);
})();
