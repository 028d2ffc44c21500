// The bar on top of every page: name, pages, health, connection, theme.
// The theme is the reader's: it is kept in the browser, and follows the system until it is switched.
const THEMES = ["auto", "light", "dark"];
const THEME_KEY = "kvmesh-theme";
const ICONS = {
  auto: "M12 3a9 9 0 1 0 0 18a9 9 0 0 0 0-18Zm0 2v14a7 7 0 0 0 0-14Z",
  light:
    "M12 7a5 5 0 1 0 0 10a5 5 0 0 0 0-10Zm-1-6h2v3h-2Zm0 19h2v3h-2ZM1 11h3v2H1Zm19 0h3v2h-3ZM4 5.4 5.4 4l2.1 2.1-1.4 1.4Zm12.5 12.5 1.4-1.4L20 18.6 18.6 20ZM4 18.6l2.1-2.1 1.4 1.4L5.4 20ZM16.5 6.1 18.6 4 20 5.4l-2.1 2.1Z",
  dark: "M12 3a9 9 0 1 0 9 9a7 7 0 0 1-9-9Z",
};

export default {
  props: { initial: Object },
  template: `
    <header class="km-top">
      <a class="km-skip" href="#km-main">Skip to content</a>
      <div class="km-top-in">
        <a class="km-brand" href="/" aria-label="kvmesh, overview">
          <svg viewBox="0 0 32 32" aria-hidden="true"><g stroke="currentColor" stroke-width="1.6" fill="none" opacity=".65">
            <path d="M8 8 24 24M24 8 8 24M8 8H24V24H8Z"/></g><g fill="currentColor"><circle cx="8" cy="8" r="3.4"/>
            <circle cx="24" cy="8" r="3.4"/><circle cx="8" cy="24" r="3.4"/><circle cx="24" cy="24" r="3.4"/></g></svg>
          <span>kvmesh</span>
        </a>
        <nav class="km-nav" aria-label="Pages">
          <a v-for="page in pages" :key="page.path" :href="page.path"
             :aria-current="page.path === path ? 'page' : null">{{ page.title
            }}<span v-if="page.count" class="km-count" :class="'km-' + page.tone">{{ page.count }}</span></a>
        </nav>
        <div class="km-top-end">
          <span class="km-pill" :class="'km-' + (live ? tone : 'warn')" role="status" :title="about">
            <i class="km-dot" aria-hidden="true"></i>{{ live ? health : "reconnecting" }}</span>
          <button type="button" class="km-icon" @click="nextTheme"
                  :aria-label="'Theme: ' + theme + '. Switch'" :title="'Theme: ' + theme">
            <svg viewBox="0 0 24 24" aria-hidden="true"><path fill="currentColor" fill-rule="evenodd" :d="icon"/></svg>
          </button>
        </div>
      </div>
    </header>`,
  data() {
    return { ...this.initial, live: true, theme: "auto" };
  },
  computed: {
    icon() {
      return ICONS[this.theme];
    },
  },
  created() {
    try {
      const kept = localStorage.getItem(THEME_KEY);
      if (THEMES.includes(kept)) this.theme = kept;
    } catch {
      // no storage in this browser: the theme follows the system
    }
    this.applyTheme();
  },
  mounted() {
    document.documentElement.lang = "en";
    this.$el.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
    this.onVisibility = () => this.$emit("visible", !document.hidden);
    document.addEventListener("visibilitychange", this.onVisibility);
    this.poll = setInterval(() => (this.live = window.socket?.connected !== false), 1000);
  },
  beforeUnmount() {
    document.removeEventListener("visibilitychange", this.onVisibility);
    clearInterval(this.poll);
  },
  methods: {
    patch(changes) {
      Object.assign(this.$data, changes);
    },
    nextTheme() {
      this.theme = THEMES[(THEMES.indexOf(this.theme) + 1) % THEMES.length];
      try {
        localStorage.setItem(THEME_KEY, this.theme);
      } catch {
        // as above
      }
      this.applyTheme();
    },
    applyTheme() {
      setDark(this.theme === "auto" ? null : this.theme === "dark");
    },
  },
};
