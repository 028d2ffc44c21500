// What needs a person, or that nothing does.
export default {
  props: { initial: Object },
  template: `
    <section class="km-card km-state" :class="'km-edge-' + tone" aria-labelledby="km-state">
      <div class="km-state-line">
        <span class="km-beacon" :class="'km-' + tone" aria-hidden="true"></span>
        <div><h1 id="km-state">{{ title }}</h1><p class="km-muted">{{ note }}</p></div>
      </div>
      <ul v-if="items.length" class="km-notices" aria-label="Needs attention">
        <li v-for="item in items" :key="item.key">
          <i class="km-dot" :class="'km-' + item.tone" aria-hidden="true"></i>
          <div><b>{{ item.title }}</b><p>{{ item.text }}</p></div>
          <a v-if="item.link" :href="item.link">{{ item.action }}</a>
        </li>
      </ul>
    </section>`,
  data() {
    return { ...this.initial };
  },
  methods: {
    patch(changes) {
      Object.assign(this.$data, changes);
    },
  },
};
