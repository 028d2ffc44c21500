// A table whose rows are sorted, searched and paged by the controller, so that a page costs the same with ten instances
// and with ten thousand. It gets the rows in view once, and then only those that have changed.
//
// A cell is a text or {t: text, s: share 0..1 as a bar, o: tone, h: link, b: what its button does, x: title, a: moment in
// ms, shown as an age}.
// On narrow screens each row is a card (style.css).
export default {
  props: { fixed: Object, initial: Object },
  template: `
    <div class="km-table" :class="{ 'km-busy': busy }">
      <div v-if="isSearchable || isPaged" class="km-tools">
        <input v-if="isSearchable" type="search" class="km-input" :placeholder="fixed.search" :aria-label="fixed.search"
               v-model="wanted" @input="ask(250)" autocomplete="off" spellcheck="false">
        <label class="km-narrow">Sort by
          <select class="km-input" :value="sort + (descending ? '-' : '+')" @change="choose($event.target.value)">
            <option v-if="!sort" value="+" disabled>as listed</option>
            <template v-for="column in sortable" :key="column.name">
              <option :value="column.name + '+'">{{ column.label }} ↑</option>
              <option :value="column.name + '-'">{{ column.label }} ↓</option>
            </template>
          </select></label>
        <span class="km-muted km-fill" aria-live="polite">{{ summary }}</span>
        <span v-if="isPaged" class="km-pager">
          <button type="button" class="km-icon" :disabled="page === 0" @click="turn(-1)" aria-label="Previous page">‹</button>
          <span class="km-num">{{ page + 1 }} / {{ pages }}</span>
          <button type="button" class="km-icon" :disabled="page + 1 >= pages" @click="turn(1)" aria-label="Next page">›</button>
        </span>
      </div>
      <table v-if="order.length">
        <caption class="km-unseen">{{ fixed.caption }}</caption>
        <thead><tr>
          <th v-for="column in fixed.columns" :key="column.name" scope="col" :class="{ 'km-right': column.right }"
              :aria-sort="column.name !== sort ? null : descending ? 'descending' : 'ascending'">
            <button v-if="column.sortable" type="button" @click="by(column)">{{ column.label
              }}<span class="km-arrow" aria-hidden="true">{{ column.name !== sort ? '' : descending ? '↓' : '↑' }}</span></button>
            <template v-else>{{ column.label }}</template>
          </th>
        </tr></thead>
        <tbody>
          <tr v-for="key in order" :key="key" :data-key="key">
            <template v-for="column in fixed.columns" :key="column.name">
              <td v-if="rows[key]" :data-label="column.label" :class="classes(column, rows[key][column.name])"
                  :title="of(rows[key][column.name]).x">
                <span v-if="of(rows[key][column.name]).s !== undefined" class="km-bar" aria-hidden="true"><i
                  :class="'km-' + (of(rows[key][column.name]).o || 'accent')"
                  :style="{ width: 100 * of(rows[key][column.name]).s + '%' }"></i></span>
                <i v-if="column.kind === 'state'" class="km-dot" :class="'km-' + of(rows[key][column.name]).o" aria-hidden="true"></i>
                <button v-if="of(rows[key][column.name]).b" type="button" class="km-button" @click="$emit('act', { key, what: of(rows[key][column.name]).b })">{{ text(rows[key][column.name]) }}</button>
                <a v-else-if="of(rows[key][column.name]).h" :href="of(rows[key][column.name]).h">{{ text(rows[key][column.name]) }}</a>
                <span v-else>{{ text(rows[key][column.name]) }}</span>
              </td>
            </template>
          </tr>
        </tbody>
      </table>
      <p v-else class="km-empty">{{ wanted ? 'Nothing matches “' + wanted + '”' : fixed.empty }}</p>
    </div>`,
  data() {
    return { wanted: "", busy: false, now: Date.now(), ...this.initial };
  },
  computed: {
    isPaged() {
      return this.pages > 1;
    },
    isSearchable() {
      return this.fixed.search && (this.isPaged || this.wanted || this.total > 7);
    },
    sortable() {
      return this.fixed.columns.filter((column) => column.sortable);
    },
    summary() {
      if (!this.isPaged && !this.wanted) return "";
      const from = this.page * this.fixed.perPage + 1;
      return this.total ? `${from} to ${from + this.order.length - 1} of ${this.total}` : "";
    },
  },
  mounted() {
    this.ticker = setInterval(() => (this.now = Date.now()), 1000);
  },
  beforeUnmount() {
    clearInterval(this.ticker);
    clearTimeout(this.timer);
  },
  methods: {
    patch({ changed, ...rest }) {
      this.busy = false;
      if (changed) for (const [key, row] of Object.entries(changed)) this.rows[key] = { ...this.rows[key], ...row };
      Object.assign(this.$data, rest);
      if (rest.order) {
        const kept = new Set(rest.order);
        for (const key of Object.keys(this.rows)) if (!kept.has(key)) delete this.rows[key];
      }
    },
    of(cell) {
      return cell !== null && typeof cell === "object" ? cell : { t: cell };
    },
    text(cell) {
      const { t, a } = this.of(cell);
      return a === undefined ? t : this.age((this.now - a) / 1000);
    },
    age(seconds) {
      if (seconds < 1.5) return "now";
      const steps = [[90, 1, "s"], [5400, 60, "min"], [129600, 3600, "h"], [Infinity, 86400, "d"]];
      const [, unit, name] = steps.find(([limit]) => seconds < limit);
      return `${Math.round(seconds / unit)} ${name} ago`;
    },
    classes(column, cell) {
      const tone = this.of(cell).o;
      const empty = cell === "" || cell === null;
      return { "km-right km-num": column.right, "km-code": column.kind === "code", "km-long": column.kind === "long", "km-none": empty, [`km-text-${tone}`]: tone && column.kind !== "state" };
    },
    by(column) {
      this.descending = column.name === this.sort ? !this.descending : Boolean(column.right);
      this.sort = column.name;
      this.page = 0;
      this.ask(0);
    },
    choose(value) {
      this.sort = value.slice(0, -1);
      this.descending = value.endsWith("-");
      this.page = 0;
      this.ask(0);
    },
    turn(step) {
      this.page += step;
      this.ask(0);
    },
    ask(delay) {
      clearTimeout(this.timer);
      if (delay) this.page = 0;
      this.timer = setTimeout(() => {
        this.busy = true;
        this.$emit("ask", { sort: this.sort, descending: this.descending, page: this.page, text: this.wanted });
      }, delay);
    },
  },
};
