"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data.rows.length) return;
  const at = (id) => document.getElementById(id);
  const PAGE = 60; // cards that are made at once
  const [REFERENCE, POLICY, OTHER] = [0, 1, 2];
  const large = at("large");
  let judge = 0; // whose scores order and fill the cards
  let found = []; // rows that pass the filters, in order
  let made = 0; // how many of them have a card
  let open = 0; // place in `found` of the one in the large view

  function make(kind, name, text) {
    const element = document.createElement(kind);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function show(value, sign = false, of = judge) {
    if (value === null || value === undefined) return "–";
    const digits = data.judges[of].digits;
    const text = Math.abs(value).toFixed(digits);
    return (value < 0 && Number(text) ? "\u2212" : sign ? "+" : "") + text;
  }

  // The policy's score less that of another side; null where either is missing.
  function change(row, from = REFERENCE, of = judge) {
    const scores = row.scores[of];
    const [before, after] = [scores[from], scores[POLICY]];
    return before === null || before === undefined || after === null ? null : after - before;
  }

  function outcome(value) {
    return value === null ? "unknown" : value > 0 ? "better" : value < 0 ? "worse" : "equal";
  }

  const orders = {
    gain: [REFERENCE, -1], loss: [REFERENCE, 1], above: [OTHER, -1], below: [OTHER, 1],
  };

  function find() {
    const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const category = at("category")?.value;
    const wanted = at("outcome").value;
    const pictured = at("pictured")?.checked;
    found = data.rows.filter((row) => {
      const text = row.text.toLowerCase();
      return words.every((word) => text.includes(word))
        && (!category || row.category === category)
        && (!wanted || outcome(change(row)) === wanted)
        && (!pictured || row.pictures.some(Boolean));
    });
    const order = orders[at("order").value];
    if (order) {
      const [from, sign] = order;
      const keys = new Map(found.map((row) => {
        const value = change(row, from);
        return [row, value === null ? Infinity : sign * value]; // unknown ones come last
      }));
      found.sort((a, b) => keys.get(a) - keys.get(b) || 0);
    }
    made = 0;
    at("cards").replaceChildren();
    at("count").value = `${found.length} of ${data.rows.length}`;
    if (!found.length) at("cards").append(make("li", "none", "No prompt matches."));
    more();
  }

  function more() {
    const cards = found.slice(made, made + PAGE).map((row, i) => card(row, made + i));
    at("cards").append(...cards);
    made += cards.length;
    at("more").hidden = made >= found.length;
  }

  function side(row, number, said) {
    const element = make("span", "side");
    if (row.pictures[number]) {
      const image = make("img");
      image.alt = said;
      image.onload = () => image.classList.toggle("pixels", image.naturalWidth <= 128);
      image.src = row.pictures[number];
      element.append(image);
    }
    const told = make("span", "told", `${data.sides[number]} `);
    told.append(make("b", "", show(row.scores[judge][number])));
    element.append(told);
    return element;
  }

  function difference(row) {
    const value = change(row);
    return make("b", outcome(value), show(value, true));
  }

  function card(row, place) {
    const item = make("li");
    const button = make("button", "card");
    button.type = "button";
    const sides = make("span", "sides");
    sides.append(...data.sides.map((name, number) => side(row, number, name)));
    const line = make("span", "change");
    line.append(difference(row), make("span", "", row.category ?? ""));
    const text = make("span", "text", row.text);
    text.dir = "auto";
    button.append(sides, line, text);
    button.addEventListener("click", () => enlarge(place));
    item.append(button);
    return item;
  }

  function enlarge(place) {
    open = place;
    const row = found[place];
    at("large-sides").replaceChildren(
      ...data.sides.map((name, number) => side(row, number, `${name}: ${row.text}`)),
    );
    at("large-place").textContent = `${place + 1} of ${found.length}`;
    at("large-text").textContent = row.text;
    const facts = [`prompt ${row.prompt}`];
    if (row.image) facts.push(`image ${row.image}`);
    if (row.seed !== null) facts.push(`seed ${row.seed}`);
    if (row.category) facts.push(row.category);
    at("large-facts").textContent = facts.join(" · ");
    at("large-scores").replaceChildren(...scores(row));
    at("previous").disabled = place === 0;
    at("next").disabled = place === found.length - 1;
    if (!large.open) large.showModal();
    large.scrollTop = 0;
  }

  function scores(row) {
    const head = make("thead");
    const names = ["", ...data.sides, "difference"];
    head.append(make("tr"));
    head.firstChild.append(...names.map((name) => {
      const cell = make("th", "", name);
      cell.scope = "col";
      return cell;
    }));
    const body = make("tbody");
    data.judges.forEach((own, number) => body.append(scored(own.name, row.scores[number], number)));
    for (const [name, values] of Object.entries(row.attributes)) {
      if (values.some((value) => value !== null)) body.append(scored(name, values, 0));
    }
    return [head, body];
  }

  function scored(name, values, of) {
    const line = make("tr");
    const head = make("th", "", name);
    head.scope = "row";
    const gained = change({ scores: [values] }, REFERENCE, 0);
    line.append(head, ...values.map((value) => make("td", "", show(value, false, of))));
    line.append(make("td", "", show(gained, true, of)));
    return line;
  }

  function step(by) {
    const place = Math.min(Math.max(open + by, 0), found.length - 1);
    if (place !== open) enlarge(place);
  }

  large.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    step(by);
  });
  large.addEventListener("click", (event) => {
    if (event.target === large) large.close(); // the backdrop
  });
  large.addEventListener("close", () => {
    while (made <= open) more();
    at("cards").children[open].firstChild.focus();
  });

  let start = null; // where a swipe began
  large.addEventListener("touchstart", (event) => {
    start = event.touches.length === 1 ? event.touches[0] : null;
  }, { passive: true });
  large.addEventListener("touchmove", (event) => {
    if (!start) return;
    const { clientX, clientY } = event.touches[0];
    // a browser takes a swipe to the right for the way back, out of the page
    if (Math.abs(clientX - start.clientX) > Math.abs(clientY - start.clientY) && event.cancelable) event.preventDefault();
  }, { passive: false });
  large.addEventListener("touchend", (event) => {
    if (!start) return;
    const end = event.changedTouches[0];
    const [right, down] = [end.clientX - start.clientX, end.clientY - start.clientY];
    start = null;
    if (Math.abs(right) > 50 && Math.abs(right) > 2 * Math.abs(down)) step(right < 0 ? 1 : -1);
  }, { passive: true });

  function judged() {
    judge = Number(at("judge")?.value ?? 0);
    for (const plot of document.querySelectorAll(".plot[data-judge]")) {
      plot.hidden = Number(plot.dataset.judge) !== judge;
    }
    find();
  }

  for (const button of document.querySelectorAll("[data-outcome]")) {
    button.addEventListener("click", () => {
      if (at("judge")) at("judge").value = "0"; // the bar counts what the first judge says
      at("outcome").value = button.dataset.outcome;
      at("order").value = button.dataset.outcome === "worse" ? "loss" : "gain";
      judged();
      at("tools").scrollIntoView();
    });
  }
  at("previous").addEventListener("click", () => step(-1));
  at("next").addEventListener("click", () => step(1));
  at("close").addEventListener("click", () => large.close());
  at("more").addEventListener("click", more);
  at("tools").addEventListener("submit", (event) => event.preventDefault());
  at("tools").addEventListener("input", (event) => (event.target.id === "judge" ? judged() : find()));
  at("scriptless").remove();
  at("tools").hidden = false;
  judged();
})();
