
document.querySelectorAll('.sweep').forEach((sweep, n) => {
  const rows = [...sweep.querySelectorAll('tr')], heads = [...rows[0].cells].slice(1);
  const scores = i => rows.filter(r => r.className === 'score').map(r => `${r.cells[0].textContent} ${r.cells[i + 1].dataset.value}`).join(', ');
  const box = document.createElement('div'); box.className = 'slider';
  box.innerHTML = `<label for="sweep${n}"></label><input type="range" id="sweep${n}" min="0" max="${heads.length - 1}" step="1"><output for="sweep${n}" aria-live="polite"></output><button type="button" aria-pressed="false">All steps</button>`;
  const [label, range, out, all] = box.children;
  label.textContent = sweep.dataset.label; range.value = heads.findIndex(h => 'start' in h.dataset);
  const show = () => {
    const i = +range.value, whole = all.getAttribute('aria-pressed') === 'true', text = [heads[i].textContent, scores(i)].filter(Boolean).join(': ');
    rows.forEach(r => [...r.cells].slice(1).forEach((c, k) => { c.hidden = !whole && k !== i; c.classList.toggle('now', whole && k === i); }));
    out.textContent = text; range.setAttribute('aria-valuetext', text);
  };
  range.addEventListener('input', show);
  all.addEventListener('click', () => { all.setAttribute('aria-pressed', all.getAttribute('aria-pressed') !== 'true'); show(); });
  sweep.prepend(box); show();
});
document.querySelectorAll('table.sortable').forEach(table => {
  const bodies = [...table.tBodies], rows = bodies.flatMap(b => [...b.rows]).filter(r => r.className !== 'job'), sorted = document.createElement('tbody');
  sorted.setAttribute('role', 'rowgroup');
  const value = (row, k) => { const c = row.cells[k]; return c.dataset.value ?? c.textContent.trim(); };
  const compare = (a, b) => { const x = Number(a), y = Number(b); return isNaN(x) || isNaN(y) ? a.localeCompare(b) : x - y; };
  const homes = rows.map(r => [r.parentNode, r.nextSibling]);
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((th, k) => {
    const button = document.createElement('button'); button.type = 'button'; button.append(...th.childNodes); th.append(button);
    const ways = 'most' in th.dataset ? ['descending', 'ascending'] : ['ascending', 'descending'];
    button.addEventListener('click', () => {
      const way = ways[ways.indexOf(th.getAttribute('aria-sort')) + 1];
      heads.forEach(h => h.removeAttribute('aria-sort'));
      if (!way) { [...rows.keys()].reverse().forEach(i => homes[i][0].insertBefore(rows[i], homes[i][1])); sorted.remove(); table.append(...bodies); return; }
      th.setAttribute('aria-sort', way);
      const full = rows.filter(r => value(r, k) !== ''), empty = rows.filter(r => value(r, k) === '');
      full.sort((a, b) => (way === 'ascending' ? 1 : -1) * compare(value(a, k), value(b, k)));
      bodies.forEach(b => b.remove()); sorted.replaceChildren(...full, ...empty); table.append(sorted);  // the head stays: it has the focus
    });
  });
});
