// 页首、菜单、语言开关、打印；最后让看得见的段画出来。
function hero() {
  const node = document.getElementById("hero");
  if (WORDS[content.kind]) node.append(say(el("p", { class: "kicker" }), () => t(content.kind)));
  node.append(say(el("h1"), () => phrase(content.title)));
  spoken.push(() => (document.title = phrase(content.title)));
  if (content.subtitle) node.append(say(el("p", { class: "subtitle" }), () => phrase(content.subtitle)));
  if (content.facts?.length) node.append(factList(content.facts));
  const dropped = () => content.left_out.map((id) => t(id)).join(inChinese() ? "、" : ", ");
  if (content.left_out) node.append(say(el("p", { class: "note" }), () => t("leftOutNote", dropped())));
  if (content.links?.length) {
    const heading = say(el("span"), () => t("related"));
    const row = el("p", { class: "links" }, heading);
    for (const [text, href] of content.links) {
      const outside = /^[a-z][a-z0-9+.-]*:/i.test(href) && !/^https?:/i.test(href); // javascript: 一类不做成链接
      row.append(say(outside ? el("span") : el("a", { href }), () => phrase(text)));
    }
    node.append(row);
  }
  say(document.getElementById("skip"), () => t("skip"));
  say(document.getElementById("foot"), () => t("footer", Plotly.version));
}

function menu() {
  const bar = document.getElementById("menu");
  spoken.push(() => bar.setAttribute("aria-label", t("menu")));
  const entry = (id) => say(el("a", { href: `#${id}`, onclick: () => drawUpTo(id) }), () => t(id));
  const entries = new Map(sections.map(({ id }) => [id, entry(id)]));
  bar.append(...entries.values());
  const onPage = new Set();
  const observer = new IntersectionObserver(
    (changes) => {
      for (const { target, isIntersecting } of changes) onPage[isIntersecting ? "add" : "delete"](target.id);
      const current = sections.find(({ id }) => onPage.has(id))?.id;
      for (const [id, entry] of entries) {
        if ((id === current) === entry.hasAttribute("aria-current")) continue;
        if (id === current) entry.setAttribute("aria-current", "true");
        else entry.removeAttribute("aria-current");
        if (id === current) bar.scrollTo({ left: entry.offsetLeft - bar.clientWidth / 2 + entry.clientWidth / 2 });
      }
    },
    { rootMargin: "-20% 0px -70% 0px" },
  );
  for (const { node } of sections) observer.observe(node);
}

function languages() {
  const bar = document.getElementById("languages");
  spoken.push(() => bar.setAttribute("aria-label", t("language")));
  const choose = (key) => {
    rememberLanguage(key);
    setLanguage(key);
  };
  for (const [key, { tag, name }] of Object.entries(LANGUAGES)) {
    const look = { type: "button", "data-language": key, lang: tag, onclick: () => choose(key) };
    const button = bar.appendChild(el("button", look, name));
    spoken.push(() => button.setAttribute("aria-pressed", String(state.language === key)));
  }
}

// 只画看得见和快要看见的段；打印前全部画好，并按纸的宽度
function watch() {
  const observer = new IntersectionObserver(
    (changes) => {
      for (const { target, isIntersecting } of changes)
        sections.find(({ node }) => node === target).visible = isIntersecting;
      drawDirty();
    },
    { rootMargin: "300px 0px" },
  );
  for (const { node } of sections) observer.observe(node);
  let width = document.documentElement.clientWidth;
  addEventListener("resize", () => {
    if (document.documentElement.clientWidth === width) return; // 手机收起地址栏只变高度
    width = document.documentElement.clientWidth;
    redraw();
  });
  const paper = (printing) => {
    document.documentElement.classList.toggle("printing", printing);
    redraw();
    if (printing) drawDirty(() => true);
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => paper(true));
  addEventListener("afterprint", () => paper(false));
}

hero();
menu();
languages();
watch();
setLanguage(state.language);
if (location.hash) {
  drawUpTo(location.hash.slice(1));
  document.getElementById(location.hash.slice(1))?.scrollIntoView();
}
