// 个例的图：一种一段，选通道与有效时刻；图是嵌在页里的 WebP，旁边的 figures/ 里是 PNG 与 PDF。
Object.assign(WORDS, {
  case: ["Case", "个例"],
  moment: ["Valid time", "有效时刻"],
  contour: ["Contour", "等值线"],
  casePlume: ["Plume", "羽状图"],
  casePlumeCaption: [
    "Forecasts against valid time, one colour per initial time (the darker, the later), or per lead time where each reaches one moment only. Thin lines or dots are members, the thick line is their mean.",
    "预报随有效时刻：一次起报一个颜色（越深越新）；每次只报到一个时刻时，一个时效一个颜色。细线或点是各成员，粗线是它们的平均。",
  ],
  caseMaps: ["Maps", "地图"],
  caseMapsTitle: ["What earlier forecasts said of this moment", "早先的预报怎样说这一刻"],
  caseMapsCaption: [
    "The truth and the forecasts valid at that time, from the shortest to the longest lead time (an ensemble: its mean); below them, forecast minus truth.",
    "真值与同一时刻有效的预报，时效由短到长（集合取平均）；下面是预报减真值。",
  ],
  caseSpaghetti: ["Spaghetti", "面条图"],
  caseSpaghettiCaption: [
    "One contour of every member: close together, the forecast is sure of its place; apart, it is not.",
    "各成员的同一条等值线：挨在一起是有把握，散开是没有把握。",
  ],
  caseMembers: ["Members", "各成员"],
  caseMembersCaption: [
    "The first members beside the truth and the mean, all in one colour scale.",
    "头几个成员，旁边是真值与平均，同一个色标。",
  ],
});

function buildPictures(pictures) {
  return (body) => {
    const bar = controls(body);
    const some = (key, list, text) => [...new Set(list.map((one) => one[key]))].map((value) => [value, text(value)]);
    const channelOf = select(bar, "channel", "channel", () => some("channel", pictures, channelText));
    const momentOf = select(bar, "moment", "moment", (own) => some("time", own, (time) => (time ? clock(time) : "")));
    const contourOf = select(bar, "contour", "contour", (own) => some("contour", own, String));
    const image = el("img", {});
    body.append(el("div", { class: "picture" }, image));
    return () => {
      const ofChannel = pictures.filter((one) => one.channel === channelOf());
      const time = momentOf(ofChannel);
      const ofTime = ofChannel.filter((one) => one.time === time);
      const contour = contourOf(ofTime);
      const shown = ofTime.find((one) => one.contour === contour);
      image.src = `data:image/webp;base64,${shown.data}`;
      const what = [t(body.id), channelText(shown.channel), time && clock(time), contour];
      image.alt = what.filter((one) => one || one === 0).join(" · ");
    };
  };
}

for (const [id, pictures] of Object.entries(content.pictures ?? {}))
  section(id, pictures.length, buildPictures(pictures));
