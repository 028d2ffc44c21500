// One request: where each of its chunks was found, why not the rest, and what to change.
const PLACES = {
  device: "in the engine's own cache",
  own_pool: "in the own pool",
  peer: "from peers",
  nowhere: "computed",
};

export default {
  props: { initial: Object },
  template: `
    <section class="km-card" aria-live="polite">
      <div class="km-head"><h1>Request</h1><span class="km-muted km-mono">{{ request }}</span>
        <a class="km-more" href="/explain">All requests</a></div>
      <p v-if="!explanations.length" :class="problem ? 'km-callout' : 'km-muted'">{{ problem || "Asking the instances …" }}</p>
      <article v-for="one in explanations" :key="one.instance_id + one.request_id" class="km-explained">
        <p class="km-summary">{{ one.summary }}</p>
        <p class="km-muted">On <a :href="'/instance?id=' + encodeURIComponent(one.instance_id)">{{ one.instance_id }}</a>,
          {{ one.prompt_tokens }} tokens in {{ one.chunks }} chunks of {{ one.chunk_tokens }}<template v-if="one.tail_tokens">, {{ one.tail_tokens }} tokens behind the last whole chunk</template>,
          waited {{ time(one.wait_s) }}<template v-if="one.separated_by.length">, kept apart by {{ one.separated_by.join(", ") }}</template><template v-if="one.ended_early">; it ended early</template>.</p>
        <div v-if="one.chunks" class="km-strip" role="img" :aria-label="spoken(one)">
          <span v-for="span in one.spans" :key="span.first_chunk" :class="'km-' + span.where" :style="{ flexGrow: span.chunks }" :title="words(span)"></span>
        </div>
        <ul class="km-legend">
          <li v-for="(words, place) in places" :key="place"><i :class="'km-' + place"></i>{{ words }} <b class="km-num">{{ one.found[place] }}</b></li>
        </ul>
        <template v-for="[title, causes] in [['Why not the rest', one.causes], ['What may be behind it', one.possible]]" :key="title">
          <h2 v-if="causes.length">{{ title }}</h2>
          <div v-for="cause in causes" :key="cause.reason + cause.instance_id + cause.first_chunk" class="km-callout km-cause">
            <p><b>{{ cause.reason }}</b><span class="km-muted" v-if="cause.chunks"> · {{ cause.chunks }} of {{ one.chunks }} chunks</span>
              <span class="km-muted" v-if="cause.instance_id"> · {{ cause.instance_id }}</span></p>
            <p>{{ cause.text }}</p><p><b>To change:</b> {{ cause.change }}</p>
            <table v-if="cause.fields.length" class="km-fields"><thead><tr><th scope="col">Field</th><th scope="col">here</th><th scope="col">there</th></tr></thead>
              <tbody><tr v-for="field in cause.fields" :key="field.field"><th scope="row">{{ field.field }}</th>
                <td class="km-code">{{ field.ours || "empty" }}</td><td class="km-code">{{ field.theirs || "empty" }}</td></tr></tbody></table>
            <p v-if="Object.keys(cause.detail).length" class="km-muted km-code">{{ detail(cause.detail) }}</p>
          </div>
        </template>
        <h2 v-if="one.fetches.length">Fetches</h2>
        <p v-for="(fetch, index) in one.fetches" :key="index">{{ fetch.chunks_fetched }} of {{ fetch.chunks_asked }} chunks from
          {{ fetch.holders.join(", ") || "nobody" }} over {{ fetch.transport }} in {{ time(fetch.seconds) }}<span class="km-muted">{{ missed(fetch.misses) }}</span></p>
        <h2 v-if="one.peers.length">Peers that took part</h2>
        <p v-for="peer in one.peers" :key="peer.instance_id"><a :href="'/instance?id=' + encodeURIComponent(peer.instance_id)">{{ peer.instance_id }}</a>
          <span class="km-muted">&nbsp;{{ peer.address }} {{ peer.transport }}, kvmesh {{ peer.version || "unknown" }}<template v-if="peer.breaker === 'open'">, left alone for a moment after failures</template><template v-if="!peer.breaker">, no peer now</template><template v-if="peer.corrupt_chunks">, {{ peer.corrupt_chunks }} corrupt chunks</template></span></p>
      </article>
      <p v-if="unanswered.length" class="km-muted">Did not answer: {{ unanswered.map((one) => one.instance_id + " (" + one.code + ")").join(", ") }}</p>
    </section>`,
  data() {
    return { places: PLACES, ...this.initial };
  },
  methods: {
    patch(changes) {
      Object.assign(this.$data, changes);
    },
    time(seconds) {
      return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
    },
    words(span) {
      const chunks = span.chunks === 1 ? `chunk ${span.first_chunk}` : `chunks ${span.first_chunk} to ${span.first_chunk + span.chunks - 1}`;
      return [chunks, PLACES[span.where], span.instance_id, span.reason].filter(Boolean).join(", ");
    },
    spoken(one) {
      return one.spans.map((span) => this.words(span)).join("; ");
    },
    detail(detail) {
      return Object.entries(detail).map(([name, value]) => `${name}=${typeof value === "number" ? Number(value.toPrecision(3)) : value}`).join("  ");
    },
    missed(misses) {
      const told = Object.entries(misses).map(([reason, chunks]) => `${reason} ${chunks}`);
      return told.length ? `, missed: ${told.join(", ")}` : "";
    },
  },
};
