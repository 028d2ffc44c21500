// Shares of equal steps of time, 0 to 100 %, as lines. A share is null where nothing was asked: the line breaks there.
const WIDTH = 600;
const HEIGHT = 160;

export default {
  props: { initial: Object },
  template: `
    <figure class="km-chart">
      <ul class="km-legend">
        <li v-for="one in series" :key="one.name"><i :class="'km-' + one.tone"></i>{{ one.name }}
          <b class="km-num">{{ at === null ? one.now : percent(one.points[at]) }}</b></li>
        <li class="km-muted km-when">{{ at === null ? note : when(at) }}</li>
      </ul>
      <div class="km-plot">
        <svg viewBox="0 0 600 160" preserveAspectRatio="none" role="img" :aria-label="spoken" @pointermove="point" @pointerleave="at = null">
          <line v-for="y in [0, 40, 80, 120, 160]" :key="y" class="km-rule" x1="0" x2="600" :y1="y" :y2="y"/>
          <g v-for="one in series" :key="one.name" :class="'km-' + one.tone">
            <path v-if="one.filled" class="km-area" :d="path(one.points, true)"/>
            <path class="km-line" :d="path(one.points, false)"/>
          </g>
          <line v-if="at !== null" class="km-cursor" :x1="x(at + 0.5)" :x2="x(at + 0.5)" y1="0" y2="160"/>
        </svg>
        <span class="km-axis" style="top: 0">100 %</span><span class="km-axis" style="top: 50%">50 %</span>
      </div>
      <figcaption class="km-times km-muted"><span>{{ oldest }}</span><span>now</span></figcaption>
    </figure>`,
  data() {
    return { at: null, ...this.initial };
  },
  computed: {
    count() {
      return Math.max(1, ...this.series.map((one) => one.points.length));
    },
    oldest() {
      return this.span(this.count);
    },
    spoken() {
      return this.series.map((one) => `${one.name}: ${one.now}`).join(", ");
    },
  },
  methods: {
    patch(changes) {
      Object.assign(this.$data, changes);
      if (this.at !== null && this.at >= this.count) this.at = null;
    },
    percent(share) {
      return share === null || share === undefined ? "–" : `${Math.round(share * 100)} %`;
    },
    x(index) {
      return (index * WIDTH) / this.count;
    },
    span(steps) {
      const seconds = steps * this.step;
      return seconds < 90 ? `${Math.round(seconds)} s ago` : `${Math.round(seconds / 60)} min ago`;
    },
    when(index) {
      const steps = this.count - 1 - index;
      return steps ? this.span(steps) : "now";
    },
    point(event) {
      const box = event.currentTarget.getBoundingClientRect();
      const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      this.at = Math.min(this.count - 1, Math.floor(share * this.count));
    },
    path(points, filled) {
      let drawn = "";
      let start = null;
      const close = () => {
        if (filled && start !== null) drawn += `V${HEIGHT}H${this.x(start).toFixed(1)}Z`;
        start = null;
      };
      points.forEach((share, index) => {
        if (share === null) return close();
        const y = (HEIGHT * (1 - share)).toFixed(1);
        drawn += start === null ? `M${this.x(index).toFixed(1)} ${y}` : `V${y}`;
        drawn += `H${this.x(index + 1).toFixed(1)}`;
        if (start === null) start = index;
      });
      close();
      return drawn;
    },
  },
};
