// Figures that are worth a glance: a name, a value, what it means, and its course over the last hour.
export default {
  props: { initial: Object },
  template: `
    <dl class="km-figures">
      <div v-for="one in figures" :key="one.name" class="km-figure km-card">
        <dt>{{ one.name }}</dt>
        <dd class="km-value km-num" :class="one.tone && 'km-text-' + one.tone">{{ one.value }}<small v-if="one.unit">{{ one.unit }}</small></dd>
        <dd class="km-note">{{ one.note }}</dd>
        <svg v-if="one.points && one.points.length > 3" class="km-spark" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true">
          <path class="km-area" :d="path(one.points) + 'L100 24L0 24Z'"/><path class="km-line" :d="path(one.points)"/>
        </svg>
      </div>
    </dl>`,
  data() {
    return { ...this.initial };
  },
  methods: {
    patch(changes) {
      Object.assign(this.$data, changes);
    },
    path(points) {
      const most = Math.max(...points) || 1;
      const step = 100 / (points.length - 1);
      return points.map((y, i) => `${i ? "L" : "M"}${(i * step).toFixed(2)} ${(22.5 - (20 * y) / most).toFixed(2)}`).join("");
    },
  },
};
