"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const data = (id) => JSON.parse(document.getElementById(id)?.textContent ?? "null");
  const bytes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));

  // Tables: a click on a column's name sorts by it, numbers by value.
  const valueOf = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace(/[,\u2212]/g, (sign) => (sign === "," ? "" : "-")));
    return Number.isNaN(number) ? text : number;
  };
  const order = (a, b) =>
    typeof a === typeof b ? (typeof a === "number" ? a - b : a.localeCompare(b)) : typeof a === "number" ? -1 : 1;
  for (const table of all("table.sortable")) {
    all("thead th", table).forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const isNumber = head.classList.contains("number");
        const before = head.getAttribute("aria-sort");
        const sort = before ? (before === "descending" ? "ascending" : "descending") : isNumber ? "descending" : "ascending";
        all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", sort);
        const rows = [...table.tBodies[0].rows].sort((a, b) => order(valueOf(a, column), valueOf(b, column)));
        table.tBodies[0].append(...(sort === "descending" ? rows.reverse() : rows));
      });
    });
  }

  const sounds = data("sounds");
  if (!sounds) return;
  const judged = data("judged");

  // Spectrograms: the colour of the text at the strength of each value, so that they follow light and dark.
  const draw = (canvas, picture) => {
    const [width, height] = [canvas.width, canvas.height];
    const [red, green, blue] = getComputedStyle(canvas).color.match(/\d+/g).map(Number);
    const image = new ImageData(width, height);
    picture.forEach((value, index) => {
      const place = 4 * ((height - 1 - Math.floor(index / width)) * width + (index % width));
      image.data.set([red, green, blue, value], place);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
  };
  const drawAll = () =>
    all(".player").forEach((one) => draw(one.querySelector("canvas"), bytes(sounds.pictures[one.dataset.key])));
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  // Players: one signal plays at a time, and all signals of a clip share one position.
  const audios = new Map();
  const audioOf = (key) => {
    if (!audios.has(key)) {
      const blob = new Blob([bytes(sounds.opus[key])], { type: "audio/webm" });
      const audio = new Audio(URL.createObjectURL(blob));
      audio.addEventListener("ended", () => stop(0));
      audios.set(key, audio);
    }
    return audios.get(key);
  };
  let current = null; // { clip, player, audio } of what plays
  let last = null; // the player that played last
  let frame = 0;
  const limited = (clip, position) => Math.min(Math.max(position, 0), Number(clip.dataset.duration));

  const show = (clip, position) => {
    const duration = Number(clip.dataset.duration);
    const slider = clip.querySelector("input[type=range]");
    slider.value = position;
    const text = `${position.toFixed(1)} s of ${duration.toFixed(1)} s`;
    slider.setAttribute("aria-valuetext", text);
    const output = clip.querySelector("output");
    output.textContent = output.textContent.replace(/^[\d.]+ s of [\d.]+ s/, text);
    clip.style.setProperty("--position", `${(100 * position) / duration}%`);
  };
  const positionOf = (clip) => Number(clip.querySelector("input[type=range]").value);
  const follow = () => {
    if (!current) return;
    show(current.clip, limited(current.clip, current.audio.currentTime));
    frame = requestAnimationFrame(follow);
  };
  const mark = (player, isOn) => {
    player.classList.toggle("playing", isOn);
    player.querySelector(".play").setAttribute("aria-pressed", String(isOn));
  };
  const stop = (position) => {
    if (!current) return;
    const { clip, player, audio } = current;
    current = null;
    cancelAnimationFrame(frame);
    audio.pause();
    mark(player, false);
    show(clip, position ?? limited(clip, audio.currentTime));
  };
  const play = (player) => {
    stop();
    const clip = player.closest(".clip");
    const audio = audioOf(player.dataset.key);
    const position = positionOf(clip);
    audio.currentTime = position >= Number(clip.dataset.duration) - 0.05 ? 0 : position;
    current = { clip, player, audio };
    last = player;
    mark(player, true);
    audio.play().catch(() => current?.audio === audio && stop());
    follow();
  };
  const seek = (clip, position) => {
    if (current?.clip === clip) current.audio.currentTime = position;
    show(clip, limited(clip, position));
  };
  for (const player of all(".player")) {
    player.querySelector(".play").addEventListener("click", () => (current?.player === player ? stop() : play(player)));
    player.querySelector(".spectrogram").addEventListener("click", (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      const clip = player.closest(".clip");
      seek(clip, ((event.clientX - box.left) / box.width) * Number(clip.dataset.duration));
      if (current?.player !== player) play(player);
    });
  }
  all(".position input").forEach((slider) =>
    slider.addEventListener("input", () => seek(slider.closest(".clip"), Number(slider.value))));

  // A and B: the same stem of the other pass, from the same position.
  const choose = (clip, letter) => {
    const button = clip.querySelector(`.switch [data-version="${letter}"]`);
    if (!button || button.getAttribute("aria-pressed") === "true") return;
    const playing = current?.clip === clip ? current.player : null;
    all(".switch button", clip).forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
    all(".version", clip).forEach((one) => { one.hidden = one.dataset.version !== letter; });
    if (!playing || !playing.closest(".version")) return;
    const shown = all(`.version[data-version="${letter}"] .player`, clip);
    const same = shown.find((one) => one.dataset.name === playing.dataset.name);
    same ? play(same) : stop();
  };
  all(".switch button").forEach((button) =>
    button.addEventListener("click", () => choose(button.closest(".clip"), button.dataset.version)));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const focused = document.activeElement;
    const clip = focused?.closest?.(".clip") ?? last?.closest(".clip");
    if (!clip) return;
    const letter = event.key.toUpperCase();
    if (letter === "A" || letter === "B") choose(clip, letter);
    else if (event.key === " " && (focused === document.body || focused?.matches("input[type=range]"))) {
      event.preventDefault();
      const own = [last, ...all(".player", clip)].find((one) => one?.closest(".clip") === clip && !one.closest("[hidden]"));
      current ? stop() : play(own);
    }
  });

  // Verdicts: kept by this browser, if it keeps anything for pages from disk.
  const stemName = (key) => `clearsep ${JSON.stringify([judged[key].pass, judged[key].iteration, judged[key].clip_id, judged[key].label])}`;
  const memory = new Map();
  const read = (name) => {
    try { return localStorage.getItem(name); } catch { return memory.get(name) ?? null; }
  };
  const write = (name, value) => {
    try { value ? localStorage.setItem(name, value) : localStorage.removeItem(name); } catch { memory.set(name, value); }
  };
  const count = () => {
    const number = Object.keys(judged).filter((key) => read(stemName(key))).length;
    document.getElementById("judged-count").textContent =
      number ? `${number} of ${Object.keys(judged).length} stems judged.` : "No verdict yet.";
    document.getElementById("download").disabled = document.getElementById("forget").disabled = !number;
  };
  const refresh = () => {
    for (const group of all(".judge")) {
      const verdict = read(stemName(group.dataset.key));
      all("button", group).forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.verdict === verdict)));
    }
    count();
  };
  for (const button of all(".judge button")) {
    button.addEventListener("click", () => {
      const isOn = button.getAttribute("aria-pressed") === "true";
      write(stemName(button.closest(".judge").dataset.key), isOn ? "" : button.dataset.verdict);
      refresh();
    });
  }
  document.getElementById("forget").addEventListener("click", () => {
    Object.keys(judged).forEach((key) => write(stemName(key), ""));
    refresh();
  });
  document.getElementById("download").addEventListener("click", () => {
    const quoted = (value) => `"${String(value).replace(/"/g, '""')}"`;
    const rows = Object.keys(judged).filter((key) => read(stemName(key)));
    const names = [...Object.keys(judged[rows[0]]), "verdict"];
    const lines = rows.map((key) => [...Object.values(judged[key]), read(stemName(key))].map(quoted).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([[names.join(","), ...lines, ""].join("\r\n")], { type: "text/csv" }));
    link.download = "verdicts.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  refresh();
})();
