// 没有图的几段：开销、数据、命令、配置、环境。
function factList(pairs) {
  const items = pairs.map(([name, value]) => {
    const item = el("div");
    spoken.push(() => {
      const text = phrase(value);
      item.className = text.length > 24 ? "wide" : "";
      item.replaceChildren(el("dt", {}, label(name)), el("dd", {}, ...breakable(text)));
    });
    return item;
  });
  return el("dl", { class: "facts" }, ...items);
}

// heads: [[列名, 靠右]]
function plainTable(holder, caption, heads, rows) {
  const css = (c) => (heads[c][1] ? "number" : "");
  const body = rows.map(([first, ...rest]) =>
    tr(th(String(first), { scope: "row" }), ...rest.map((v, c) => td(valueText(v), css(c + 1)))),
  );
  fillTable(holder, caption, tr(...heads.map(([text], c) => th(text, { class: css(c) }))), body);
}

const bytesText = (value) => prefixed(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
const COSTS = [
  ["parameters", (v) => integer(v)],
  ["flops_per_sample", (v) => prefixed(v, 1000, ["", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"])],
  ["training_seconds", duration],
  ["training_samples_per_second", (v) => num(v, 3)],
  ["inference_samples_per_second", (v) => num(v, 3)],
  ["training_peak_memory_bytes", bytesText],
  ["inference_peak_memory_bytes", bytesText],
  ["training_device", (v) => v ?? "–"],
  ["device", (v) => v ?? "–"],
];

section("costs", content.costs?.length, (body) => {
  const table = body.appendChild(el("div", { class: "scroll heads" }));
  const used = COSTS.filter(([key]) => content.costs.some((row) => row[key] !== null && row[key] !== undefined));
  const rows = content.costs.map((row) => {
    return { name: row.name, values: used.map(([key]) => row[key]), texts: used.map(([key, text]) => text(row[key])) };
  });
  return () => {
    const heads = used.map(([key]) => t(key));
    sortedTable(table, t("costsTitle"), t("model"), heads, rows, () => Infinity);
  };
});

function buildData(body) {
  const { facts = [], missing } = content.data ?? {};
  if (facts.length) body.append(factList(facts));
  const lost = body.appendChild(el("div", { class: "scroll tall" }));
  const counted = el("div", { class: "scroll tall" });
  if (content.data && content.fields) body.append(say(el("p", { class: "caption apart" }), () => t("fieldsCaption")));
  if (content.fields) body.append(counted);
  return () => {
    const heads = [[t("channel")], [t("count"), true], [t("first")], [t("last")], [t("reason")]];
    const rows = (missing ?? []).map(([channel, n, first, last, reason]) => [channel, n, first, last, label(reason)]);
    if (rows.length) plainTable(lost, t("dataCaption"), heads, rows);
    else if (missing) lost.replaceChildren(el("p", { class: "note" }, t("noMissing")));
    const counts = Object.entries(content.fields ?? {});
    const spans = counts.map(([name, n]) => [name, countSpan(n.scored), countSpan(n.left_out)]);
    plainTable(counted, t("fieldsCaption"), [[t("channel")], [t("scored"), true], [t("leftOut"), true]], spans);
  };
}

section("data", content.data || content.fields, buildData, { caption: content.data ? "dataCaption" : "fieldsCaption" });

function copyButton(text) {
  const button = el("button", { type: "button", class: "copy" });
  const face = say(button, () => t("copy"));
  button.addEventListener("click", () => {
    const area = el("textarea", {}); // 从磁盘打开时 navigator.clipboard 未必可用，选中再复制到处都行
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    face.textContent = t("copied");
    setTimeout(() => {
      face.textContent = t("copy");
    }, 1500);
  });
  return button;
}

const codeBlock = (text, ...children) =>
  el("div", { class: "code" }, copyButton(text), el("pre", { tabindex: 0 }, el("code", {}, ...children)));

// YAML：键、注释着色
function yamlLines(text) {
  const colored = (css, part) => el("span", { class: css }, part ?? "");
  return text
    .trimEnd()
    .split("\n")
    .flatMap((row) => {
      const [, indent, key, rest, comment] = /^(\s*(?:- )?)([^\s#:][^:#]*:)?(.*?)(\s#.*|#.*)?$/.exec(row);
      return [indent, colored("key", key), rest, colored("remark", comment), "\n"];
    });
}

section("reproduce", content.reproduce?.length || content.config || content.environment, (body) => {
  const block = (word, node) => {
    const heading = say(el("h3"), () => t(word));
    body.append(heading, node);
  };
  const commands = (content.reproduce ?? []).join("\n");
  if (commands) block("commands", codeBlock(commands, commands));
  if (content.config) block("configuration", codeBlock(content.config, ...yamlLines(content.config)));
  if (content.environment) block("environment", factList(Object.entries(content.environment)));
  return () => {};
});
