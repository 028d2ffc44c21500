// Who fetches from whom: a picture of the busiest instances, and the same as a matrix where there is room.
const RADIUS = 150;

export default {
  props: { fixed: Object, initial: Object },
  template: `
    <div :class="{ 'km-flow-both': fixed.matrix && names.length }">
      <p v-if="!names.length" class="km-empty">{{ fixed.empty }}</p>
      <template v-else>
        <svg class="km-graph" viewBox="-290 -215 580 430" role="img" :aria-label="spoken">
          <g v-for="edge in drawn" :key="edge.key" class="km-edge" :class="{ 'km-moving': edge.rate > 0, 'km-faded': isFaded(edge) }">
            <path :d="edge.path" :stroke-width="edge.width"/><path class="km-head" :d="edge.head"/>
            <title>{{ edge.title }}</title>
          </g>
          <g v-for="node in nodes" :key="node.name" class="km-node" @pointerenter="focus = node.index" @pointerleave="focus = null">
            <circle :cx="node.x" :cy="node.y" :r="node.r"/>
            <text :x="node.tx" :y="node.ty" :text-anchor="node.anchor">{{ node.label }}</text>
            <title>{{ node.name }}</title>
          </g>
        </svg>
        <div v-if="fixed.matrix" class="km-matrix-box">
          <table class="km-matrix">
            <caption class="km-muted">Bytes per second that each row fetches from each column</caption>
            <thead><tr><td></td><th v-for="name in names" :key="name" scope="col" :title="name"><span>{{ shorten(name, 14) }}</span></th></tr></thead>
            <tbody><tr v-for="(name, row) in names" :key="name">
              <th scope="row" :title="name">{{ shorten(name, 18) }}</th>
              <td v-for="(other, column) in names" :key="other" :class="{ 'km-self': row === column }" :style="heat(row, column)"
                  :title="cell(row, column)?.title"><span class="km-num">{{ cell(row, column)?.text }}</span></td>
            </tr></tbody>
          </table>
        </div>
      </template>
    </div>`,
  data() {
    return { focus: null, ...this.initial };
  },
  computed: {
    byCell() {
      return Object.fromEntries(this.edges.map((edge) => [`${edge.to}:${edge.from}`, edge]));
    },
    most() {
      return Math.max(1, ...this.edges.map((edge) => edge.weight));
    },
    spoken() {
      return this.edges.slice(0, 5).map((edge) => edge.title).join("; ") || this.fixed.empty;
    },
    nodes() {
      const count = this.names.length;
      return this.names.map((name, index) => {
        const angle = (2 * Math.PI * index) / count - Math.PI / 2;
        const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
        const side = Math.abs(cos) < 0.2 ? 0 : Math.sign(cos);
        return {
          name, index, r: 9,
          x: RADIUS * cos, y: RADIUS * sin,
          tx: (RADIUS + 18) * cos, ty: (RADIUS + 24) * sin + 4,
          anchor: ["end", "middle", "start"][side + 1],
          label: this.shorten(name, side ? 15 : 24),
        };
      });
    },
    drawn() {
      return this.edges.map((edge) => {
        const [a, b] = [this.nodes[edge.from], this.nodes[edge.to]];
        // Both directions of a pair bow to their own side, so that neither hides the other.
        const [dx, dy] = [b.x - a.x, b.y - a.y];
        const length = Math.hypot(dx, dy) || 1;
        const [nx, ny] = [-dy / length, dx / length];
        const bow = Math.min(46, length * 0.18);
        const [cx, cy] = [(a.x + b.x) / 2 + nx * bow, (a.y + b.y) / 2 + ny * bow];
        const ends = (from, to, gap) => {
          const reach = Math.hypot(to.x - from.x, to.y - from.y) || 1;
          return { x: to.x - ((to.x - from.x) / reach) * gap, y: to.y - ((to.y - from.y) / reach) * gap };
        };
        const start = ends({ x: cx, y: cy }, a, a.r + 2);
        const end = ends({ x: cx, y: cy }, b, b.r + 9);
        const tip = ends({ x: cx, y: cy }, b, b.r + 1);
        const width = 1.2 + 4.8 * Math.sqrt(edge.weight / this.most);
        const half = 3.5 + width / 2;
        const [ux, uy] = [tip.x - end.x, tip.y - end.y];
        const norm = Math.hypot(ux, uy) || 1;
        const [px, py] = [(-uy / norm) * half, (ux / norm) * half];
        const f = (number) => number.toFixed(1);
        return {
          ...edge, width,
          key: `${edge.from}:${edge.to}`,
          path: `M${f(start.x)} ${f(start.y)}Q${f(cx)} ${f(cy)} ${f(end.x)} ${f(end.y)}`,
          head: `M${f(tip.x)} ${f(tip.y)}L${f(end.x + px)} ${f(end.y + py)}L${f(end.x - px)} ${f(end.y - py)}Z`,
        };
      });
    },
  },
  methods: {
    patch(changes) {
      Object.assign(this.$data, changes);
      if (this.focus !== null && this.focus >= this.names.length) this.focus = null;
    },
    shorten(name, limit) {
      // The end of an instance's name tells it from the others.
      return name.length <= limit ? name : "…" + name.slice(1 - limit);
    },
    isFaded(edge) {
      return this.focus !== null && edge.from !== this.focus && edge.to !== this.focus;
    },
    cell(row, column) {
      return this.byCell[`${row}:${column}`];
    },
    heat(row, column) {
      const edge = this.cell(row, column);
      return edge ? { "--heat": `${Math.round(12 + 73 * Math.sqrt(edge.weight / this.most))}%` } : null;
    },
  },
};
