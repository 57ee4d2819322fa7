/* What is looked up about an event that is not like the one before: rules, and counts by key. See rules.h.
 *
 * Functions that programs call: they are compiled once, and the loader puts them behind each program that does. At the end,
 * the way of a counter that has no place yet.
 * Cost: a hash for each kind of rule that has to do with the event; for each key, when the place is needed for others.
 */
#include "common.h"

/* ---- what the rules say ---- */

/* What was met so far: the smallest of each sort, UNSAID or more where there was none; and the rule at hand. */
#define UNSAID (2 * WHOLE)
struct terms {
    struct place *place;
    struct rule *rule;
    u64 thins;
    u64 instead;
    u64 learned;
    u64 last;  /* of place->met */
    u64 asked; /* and OWN_SIDE, where the rule is about the address that is not counted by: learned rules are about the other */
};
#define OWN_SIDE (1ULL << 63)

int rules_weigh(struct terms *terms) {
    struct place *place = terms->place;
    struct rule *rule = terms->rule;
    u32 class = CLASS_OF(place->like), at = place->rules;
    u64 chance, learned = rule->learned >> class & 1, met;
    if (!((rule->thins | rule->instead) >> class & 1) && learned <= terms->asked >> 63)
        return 0;
    chance = chance_of(rule->ratios[class]);
    terms->thins = smaller(terms->thins, chance + (~rule->thins >> class & 1) * UNSAID);
    terms->instead = smaller(terms->instead, chance + (~rule->instead >> class & 1) * UNSAID);
    terms->learned = smaller(terms->learned, chance + (learned ^ 1) * UNSAID);
    met = rule->slot << 1 | learned;
    if (terms->last == met || at >= RULES_MET) /* by the other side of a flow */
        return 0;
    terms->last = met;
    place->met[at] = met;
    place->rules = at + 1;
    place->learned += learned;
    return 0;
}
static long (*weigh)(struct terms *terms) = (void *)CALL_rules_weigh;

INLINE void apply(void *map, const void *key, struct terms *terms) {
    terms->rule = map_lookup(map, key);
    if (terms->rule)
        weigh(terms);
}

INLINE void apply_to_flow(struct terms *terms) {
    struct place *place = terms->place;
    u64 asked = terms->asked;
#pragma clang loop unroll(disable)
    for (u32 side = 0; asked & FILTER_PREFIX && side < 2; side++) {
        struct prefix prefix = {.length = 128};
        __builtin_memcpy(prefix.address, side ? &place->longer[LONGER_OWN] : &place->like[LIKE_KEY], 16);
        terms->asked |= side * OWN_SIDE;
        if (!side || asked & FILTER_OWN)
            apply(MAP(filter_prefix), &prefix, terms);
    }
    terms->asked = asked;
#pragma clang loop unroll(disable)
    for (u32 side = 0; asked & FILTER_PORT && side < 2; side++) {
        u32 port = place->longer[LONGER_WHO] >> 32 + side * 16 & 0xffff;
        apply(MAP(filter_port), &port, terms);
    }
}

INLINE void apply_rules(struct terms *terms) {
    struct place *place = terms->place;
    const u64 *longer = place->longer;
    u64 asked = terms->asked;
    u32 pid = longer[LONGER_WHO], call = longer[LONGER_WHO] >> 32;
    if (asked & FILTER_PID)
        apply(MAP(filter_pid), &pid, terms);
    if (asked & FILTER_COMM)
        apply(MAP(filter_comm), place->comm, terms);
    if (asked & FILTER_SYSCALL)
        apply(MAP(filter_syscall), &call, terms);
    if (asked & FILTER_NETNS) {
        struct netns_id netns = NETNS_OF(place->like);
        apply(MAP(filter_netns), &netns, terms);
    }
    if (asked & FILTER_CGROUP)
        apply(MAP(filter_cgroup), &longer[LONGER_CGROUP], terms);
    apply_to_flow(terms);
}

int rules_decide(struct subject *about) {
    u32 slot = about->slot;
    struct place *place = map_lookup(MAP(places), &slot);
    struct terms terms = {place};
    u64 chance = about->chance, none;
    if (!place)
        return 0;
    terms.thins = terms.instead = terms.learned = terms.last = UNSAID + (place->busy >> 7); /* which the verifier cannot know */
    terms.asked = asked_of(about->filters, (struct sort){about->class, about->who, about->flow.family});
    place->rules = place->learned = 0;
    apply_rules(&terms);
    if (terms.instead <= WHOLE)
        chance = terms.instead;
    else if (terms.thins > WHOLE)
        chance = smaller(terms.learned, WHOLE);
    place->ratio = smaller((chance >> 1) * smaller(terms.thins, WHOLE) >> 31, ALL); /* in 64 bits is no room for their product */
    none = ((terms.thins - 1) | (terms.instead - 1)) >> 63; /* is left of it: of both 0 is the least */
    place->special = none * FILTERED | (place->rules != place->learned) * CONFIGURED;
    return judged(about, place);
}

/* ---- whose events they are ---- */

INLINE struct key_load *load_of(void *map, u32 id, const void *key, u32 class, u32 amount) {
    struct key_load *load = map_lookup(map, key), *fresh;
    u32 zero = 0;
    if (!load) {
        fresh = map_lookup(MAP(load_fresh), &zero);
        if (fresh && !map_update(map, key, fresh, 1 /* BPF_NOEXIST */))
            inserted(id);
        load = map_lookup(map, key);
    }
    if (!load) {
        insert_failed(id);
        return 0;
    }
    class -= FIRST_COUNTED;
    if (class < 6 && amount) /* to add 0 is nothing that the compiler has an instruction for */
        RAISE(load->counts[class], amount);
    return load;
}
#define LOAD_OF(kind, key, class, amount) load_of(MAP(load_##kind), MAP_ID_load_##kind, key, class, amount)

/* Counts for the rules that were met. Per CPU, for all events of a heavy hitter meet one. */
INLINE void count_for_rules(const struct place *place, u32 learned, u32 amount) {
#pragma clang loop unroll(disable)
    for (u32 i = 0; i < RULES_MET && i < place->rules; i++) {
        u32 slot = place->met[i] >> 1;
        struct matches *matches = map_lookup(MAP(rule_matches), &slot);
        if (matches && (place->met[i] & 1) == learned)
            RAISE(matches->by_origin[learned], amount);
    }
}

int rules_matched(struct place *place) {
    count_for_rules(place, 0, 1);
    return 0;
}

int rules_settle(struct place *place) {
    u32 class = CLASS_OF(place->like), asked = REST_OF(place->like), amount = place->pending;
    place->pending = 0;
    if (place->learned)
        count_for_rules(place, 1, amount);
    if (asked & COUNT_NETNS && INUM_OF(place->like)) {
        struct netns_id netns = NETNS_OF(place->like);
        LOAD_OF(netns, &netns, class, amount);
    }
    if (asked & COUNT_COMM)
        LOAD_OF(comm, place->comm, class, amount);
    if (asked & COUNT_PREFIX) {
        struct prefix prefix = {.length = 128};
        const u64 *address = &place->like[LIKE_KEY];
        __builtin_memcpy(prefix.address, address, 16);
        if (address[0] | address[1]) /* else it has none */
            LOAD_OF(prefix, &prefix, class, amount);
    }
    return 0;
}

/* ---- counters and their places ---- */

/* A program in an interrupt may come between any two steps: what it finds busy it leaves, what it takes is no longer free. Events
 * of the counter before may be pending there: whoever is called by a judgement itself has no room to settle them. */
INLINE int count_begun(struct place *at, const struct count_key *key, int settles) {
    int begun = 0;
    if (at->counter || at->busy || (at->pending && !settles))
        return 0;
    at->busy = 1;
    BARRIER();
    if (!at->counter) {
        if (at->pending && settles)
            settle(at);
        at->generation = 0;
        at->like[LIKE_COOKIE] = key->netns.cookie;
        at->like[LIKE_WHAT] = key->netns.inum;
        at->what = key->what;
        at->count = 0;
        BARRIER();
        at->counter = key->counter;
        begun = 1;
    }
    BARRIER();
    at->busy = 0;
    return begun;
}

/* The counter's place; 0 where both that it may have are others'. */
INLINE struct place *count_place(const struct count_key *key, int settles) {
    struct place *free = 0;
    u32 slot = count_slot(key);
#pragma unroll
    for (u32 way = 0; way < 2; way++) {
        struct place *at = map_lookup(MAP(places), &slot);
        if (!at)
            return 0;
        if (is_count_of(at, key))
            return at;
        if (!free && !at->counter)
            free = at;
        slot++;
    }
    return free && count_begun(free, key, settles) ? free : 0;
}

/* Counts one more. The answer is 1 where that is the first, 0 else. A full map is counted. */
int count_slowly(const struct count_key *key) {
    struct place *at = count_place(key, 1);
    u64 one = 1, *counter;
    if (at) {
        RAISE(at->count, 1);
        return 1;
    }
    counter = map_lookup(MAP(counted), key);
    if (!counter) {
        if (!map_update(MAP(counted), key, &one, 1 /* BPF_NOEXIST: another CPU may have been faster */))
            return 1;
        counter = map_lookup(MAP(counted), key);
    }
    if (counter)
        RAISE(*counter, 1);
    else
        insert_failed(MAP_ID_counted);
    return 0;
}

/* Counts one more event of a second of 2^30 ns, which is in the upper half. Below the quota one in 16 asks what second it is. */
INLINE u64 nth_of_second(u64 *counted, u64 quota) {
    u64 nth = *counted;
    if ((u32)nth + 1 >= quota || !(nth % 16)) {
        u64 second = bpf_ktime_get_ns() >> 30 << 32;
        if ((nth ^ second) >> 32)
            nth = second;
    }
    *counted = nth + 1;
    return (u32)nth + 1;
}

int rules_quota(const struct subject *about) {
    struct count_key key = {.netns = about->netns, .counter = COUNT_QUOTAS};
    struct place *at = count_place(&key, 0);
    struct key_load *load;
    u32 slot = QUOTA;
    u64 *quota = map_lookup(MAP(constants), &slot), nth;
    if (!quota || !*quota)
        return 0;
    if (at) {
        nth = nth_of_second(&at->count, *quota);
    } else {
        load = LOAD_OF(netns, &key.netns, about->class, 0);
        if (!load)
            return 0;
        nth = nth_of_second(&load->second, *quota);
    }
    return (nth >= *quota) + (nth >= *quota * 2) + (nth >= *quota * 4) + (nth >= *quota * 8) + (nth >= *quota * 16) +
           (nth >= *quota * 32);
}
