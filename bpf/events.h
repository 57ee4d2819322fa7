/* The path of an event: rules, counts by key, one coin for all that thins it, the brake, room in a ring, its head, the account.
 *
 * Cost: see README.md. Nothing here is written by several CPUs, but for the rings: what is counted is counted per CPU.
 */
#ifndef CNI_EVENTS_H
#define CNI_EVENTS_H

#include "common.h"

enum event_class { NETNS, VETH, CNI_RUN, PACKET_DROP, TCP_FAULT, EXEC, CONNECTION, CONNECTION_CLOSE, SYSCALL, CLASSES };

/* The head of each record; its body follows. 48 bytes. */
struct event {
    u64 time; /* CLOCK_MONOTONIC, ns */
    u64 cookie;
    u32 inum;
    u8 class;
    u8 kind; /* what happened, a number of the program's own */
    u16 size;
    u32 ratio; /* in 1/2^32, ALL: 1: the record stands for 1/ratio events */
    u32 pid;   /* tgid; 0 where nobody is behind it: a packet in an interrupt */
    char comm[16];
};
#define ALL 0xffffffffU

/* seen = filtered + sampled_out + lost + submitted, per class, always. */
struct account {
    u64 seen;
    u64 filtered;
    u64 sampled_out;
    u64 lost;
    u64 submitted;
};

/* What rules say about one subject, for the classes of three masks. `thins`: what the class' ratio leaves; 0 filters. `instead`:
 * in place of the class' ratio; 0 filters. `learned`: the class' ratio is no higher than this, for events of which neither of
 * the first two, which are configured, says anything about any of their subjects. */
struct rule {
    u32 thins;
    u32 instead;
    u32 learned;
    u32 slot; /* of rule_matches */
    u32 ratios[16];
};

/* Events that a rule met, by its origin: configured, learned. Per CPU, for all of them at once meet a heavy hitter's rule. */
struct matches {
    u64 by_origin[2];
};

struct prefix {
    u32 length; /* bits, of 128 */
    u8 address[16];
};

struct comm {
    char text[16];
};

enum filter {
    FILTER_PID = 1,
    FILTER_COMM = 2,
    FILTER_PREFIX = 4,
    FILTER_PORT = 8,
    FILTER_SYSCALL = 16,
    FILTER_NETNS = 32,
    FILTER_CGROUP = 64
};
#define FILTERS 127
/* Beside them in the same word: what is counted by key. */
enum counting { COUNT_NETNS = 1 << 16, COUNT_COMM = 1 << 17, COUNT_PREFIX = 1 << 18, COUNT_QUOTA = 1 << 19 };
#define FILTER_FLOW (FILTER_PREFIX | FILTER_PORT | COUNT_PREFIX)

/* What one key (a namespace, a command, an address) sent, per CPU; critical classes are neither counted nor thinned by key.
 * Counts wrap: whoever reads them asks for differences. */
#define FIRST_COUNTED PACKET_DROP
struct key_load {
    u32 counts[6];
    u32 second; /* of the quota */
    u32 nth;
};
_Static_assert(CLASSES - FIRST_COUNTED <= 6, "a class has no place in struct key_load");

SHAPE(account, u32, struct account);
SHAPE(ratios, u32, u32);
SHAPE(filters, u32, u32);
SHAPE(filter_pid, u32, struct rule);
SHAPE(filter_comm, struct comm, struct rule);
SHAPE(filter_prefix, struct prefix, struct rule);
SHAPE(filter_port, u32, struct rule);
SHAPE(filter_syscall, u32, struct rule);
SHAPE(filter_netns, struct netns_id, struct rule);
SHAPE(filter_cgroup, u64, struct rule);
SHAPE(rule_matches, u32, struct matches);
SHAPE(load_netns, struct netns_id, struct key_load);
SHAPE(load_comm, struct comm, struct key_load);
SHAPE(load_prefix, struct prefix, struct key_load);
SHAPE(load_fresh, u32, struct key_load);
SHAPE(fullest, u32, u64);

/* Who is behind an event: the running process, one that is known from before, or nobody. Rules by PID and command hold
 * for the first two alone, by cgroup for the first. */
enum who { WHO_RUNS, WHO_IS_KNOWN, WHO_IS_NOBODY };

/* What an event is about; all that a filter may ask for. */
struct subject {
    struct netns_id netns;
    u32 class;
    u32 kind;
    u32 syscall;
    u32 who;
    u32 pid; /* with WHO_IS_KNOWN */
    struct comm comm;
};

/* One map lookup: which filter maps are not empty, what is counted. */
INLINE u32 filters_in_use(void) {
    u32 zero = 0;
    u32 *flags = map_lookup(MAP(filters), &zero);
    return flags ? *flags : 0;
}

/* ---- what the rules say ---- */

/* Chances are in 1/2^32, so that 1 has a number of its own. There are no branches in this arithmetic, and nothing in it that
 * the verifier knows: else it would follow each combination of what rules may have said, which are too many. */
#define WHOLE (1ULL << 32)
INLINE u64 chance_of(u32 ratio) {
    return (u64)ratio + (((u64)ratio + 1) >> 32);
}

INLINE u64 smaller(u64 a, u64 b) {
    u64 borrow = (a - b) >> 63;
    asm volatile("" : "+r"(borrow)); /* or the compiler makes it a branch */
    return b + (a - b) * borrow;
}

/* A chance that was there does not become 0: its events would be told of by nobody. */
INLINE u64 halved(u64 chance, u32 times) {
    u64 there = (0 - chance) >> 63;
    asm volatile("" : "+r"(there));
    chance >>= times & 31;
    return chance + (((chance - 1) >> 63) & there);
}

/* The smallest of each sort that was met; UNSAID or more where there was none. */
#define UNSAID (2 * WHOLE)
struct terms {
    u64 thins;
    u64 instead;
    u64 learned;
};

INLINE void apply(void *map, const void *key, u32 class, struct terms *terms) {
    struct rule *rule = map_lookup(map, key);
    struct matches *matches;
    u32 slot;
    u64 chance, learned;
    if (!rule || !((rule->thins | rule->instead | rule->learned) >> class & 1))
        return;
    slot = rule->slot;
    matches = map_lookup(MAP(rule_matches), &slot);
    chance = chance_of(rule->ratios[class & 15]);
    learned = rule->learned >> class & 1;
    terms->thins = smaller(terms->thins, chance + (~rule->thins >> class & 1) * UNSAID);
    terms->instead = smaller(terms->instead, chance + (~rule->instead >> class & 1) * UNSAID);
    terms->learned = smaller(terms->learned, chance + (learned ^ 1) * UNSAID);
    if (matches)
        RAISE(matches->by_origin[learned], 1);
}

INLINE void apply_to_flow(const struct flow *flow, u32 filters, u32 class, struct terms *terms) {
#pragma clang loop unroll(disable) /* it is the larger part of what is compiled */
    for (u32 side = 0; side < 2; side++) {
        const u8 *address = side ? flow->destination : flow->source;
        if (filters & FILTER_PREFIX) {
            struct prefix prefix = {.length = 128};
            __builtin_memcpy(prefix.address, address, 16);
            apply(MAP(filter_prefix), &prefix, class, terms);
        }
        if (filters & FILTER_PORT) {
            u32 port = side ? flow->destination_port : flow->source_port;
            apply(MAP(filter_port), &port, class, terms);
        }
    }
}

INLINE void apply_rules(const struct subject *about, const struct flow *flow, const struct comm *comm, u32 filters,
                        struct terms *terms) {
    u32 class = about->class;
    if (filters & FILTER_PID && about->who != WHO_IS_NOBODY) {
        u32 pid = about->who == WHO_RUNS ? bpf_get_current_pid_tgid() >> 32 : about->pid;
        apply(MAP(filter_pid), &pid, class, terms);
    }
    if (filters & FILTER_COMM && about->who != WHO_IS_NOBODY)
        apply(MAP(filter_comm), comm, class, terms);
    if (filters & FILTER_SYSCALL && class == SYSCALL)
        apply(MAP(filter_syscall), &about->syscall, class, terms);
    if (filters & FILTER_NETNS)
        apply(MAP(filter_netns), &about->netns, class, terms);
    if (filters & FILTER_CGROUP && about->who == WHO_RUNS) {
        u64 cgroup = bpf_get_current_cgroup_id();
        apply(MAP(filter_cgroup), &cgroup, class, terms);
    }
    if (filters & FILTER_FLOW && flow)
        apply_to_flow(flow, filters, class, terms);
}

/* The chance by rules and class; the answer is 0 where the event is filtered. */
INLINE int chance_by_rules(const struct terms *terms, u64 *chance) {
    if (!terms->thins || !terms->instead)
        return 0;
    if (terms->instead <= WHOLE)
        *chance = terms->instead;
    else if (terms->thins > WHOLE)
        *chance = smaller(*chance, terms->learned);
    *chance = (*chance >> 1) * smaller(terms->thins, WHOLE) >> 31; /* WHOLE times WHOLE has no room in 64 bits */
    return 1;
}

/* ---- whose events they are ---- */

INLINE struct key_load *load_of(void *map, u32 id, const void *key, u32 class) {
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
    if (class < 6)
        RAISE(load->counts[class], 1);
    return load;
}
#define LOAD_OF(kind, key, class) load_of(MAP(load_##kind), MAP_ID_load_##kind, key, class)

/* Halvings for the n-th event of a namespace in a second (of 2^30 ns) on this CPU, once it has had its quota m:
 * 1 + log2(n / m), at most 6. */
INLINE u32 halvings_by_quota(struct key_load *load, u64 now) {
    u32 slot = QUOTA, second = now >> 30;
    u64 *quota = map_lookup(MAP(constants), &slot), nth;
    if (!quota || !*quota)
        return 0;
    if (load->second != second) {
        load->second = second;
        load->nth = 0;
    }
    nth = ++load->nth;
    return (nth >= *quota) + (nth >= *quota * 2) + (nth >= *quota * 4) + (nth >= *quota * 8) + (nth >= *quota * 16) +
           (nth >= *quota * 32);
}

/* Counts the event for each key that it has; the answer is by how many halvings its namespace's quota thins it. */
INLINE u32 count_keys(const struct subject *about, const struct flow *flow, const struct comm *comm, u32 filters, u64 *now) {
    u32 class = about->class, halvings = 0;
    if (filters & COUNT_NETNS && about->netns.inum) {
        struct key_load *load = LOAD_OF(netns, &about->netns, class);
        if (load && filters & COUNT_QUOTA) {
            *now = bpf_ktime_get_ns();
            halvings = halvings_by_quota(load, *now);
        }
    }
    if (filters & COUNT_COMM && about->who != WHO_IS_NOBODY)
        LOAD_OF(comm, comm, class);
    if (filters & COUNT_PREFIX && flow && flow->family) {
        struct prefix prefix = {.length = 128}; /* the other side: a dropped packet's sender, a socket's peer */
        __builtin_memcpy(prefix.address, class == PACKET_DROP ? flow->source : flow->destination, 16);
        LOAD_OF(prefix, &prefix, class);
    }
    return halvings;
}

/* ---- the brake ---- */

#define RING MAP_ENTRIES_events /* bytes, a power of two */

/* Halvings by the fill of the ring: from a quarter on one more for each eighth, in the last eighth for each 64th; warnings
 * begin one later, errors two. What is not sent so is sampled out, with its weight on what is sent: it takes a reader that
 * stands still for seconds to fill the ring with what nobody can read. */
INLINE u32 halvings_by_fill(u32 class) {
    u32 zero = 0, steps, begin = class == PACKET_DROP ? 3 : class == TCP_FAULT ? 2 : 1;
    u64 used = ring_query(MAP(events), 0 /* BPF_RB_AVAIL_DATA */), *fullest;
    if (used < RING / 8)
        return 0;
    fullest = map_lookup(MAP(fullest), &zero);
    if (fullest && used > *fullest)
        *fullest = used;
    steps = used / (RING / 8);
    if (used >= RING / 8 * 7)
        steps += (used - RING / 8 * 7) / (RING / 64);
    return steps > begin ? steps - begin : 0;
}

/* Fills in the head of an event that is kept. */
INLINE void event_fill(struct event *event, const struct subject *about, u64 now, u64 chance, u64 size) {
    event->time = now ? now : bpf_ktime_get_ns();
    event->cookie = about->netns.cookie;
    event->inum = about->netns.inum;
    event->class = about->class;
    event->kind = about->kind;
    event->size = size;
    event->ratio = chance == WHOLE ? ALL : chance;
    if (about->who == WHO_RUNS) {
        event->pid = bpf_get_current_pid_tgid() >> 32;
        bpf_get_current_comm(event->comm, sizeof(event->comm));
    } else {
        event->pid = about->pid;
        __builtin_memcpy(event->comm, about->comm.text, sizeof(event->comm));
    }
}

/* One coin for everything that thins: it decides on the chance so far, and again once the brake has lowered it. The answer is
 * 0 where the event is out. */
INLINE int event_drawn(u32 class, u64 *chance) {
    u64 drawn = bpf_get_prandom_u32();
    if (drawn >= *chance)
        return 0;
    *chance = halved(*chance, halvings_by_fill(class));
    return drawn < *chance;
}

/* What becomes of an event for which room was asked in a ring. */
INLINE struct event *event_placed(struct event *event, struct account *account, const struct subject *about, u64 now,
                                  u64 chance, u64 size) {
    if (!event) {
        RAISE(account->lost, 1);
        return 0;
    }
    RAISE(account->submitted, 1);
    event_fill(event, about, now, chance, size);
    return event;
}

/* Decides on an event that is not critical and, where it is kept, gives room in the ring with the head filled in. `size`
 * (head and body) must be a constant. `filters` is what filters_in_use() said: where it has a bit of FILTER_FLOW, `flow`
 * must be filled. The caller fills the body and calls event_submit. 0: the event is not kept, and that is accounted for. */
INLINE struct event *event_reserve(const struct subject *about, const struct flow *flow, u32 filters, u64 size) {
    u32 class = about->class;
    struct account *account = map_lookup(MAP(account), &class);
    u32 *class_ratio = map_lookup(MAP(ratios), &class);
    u64 chance, now, nothing;
    if (!account || !class_ratio)
        return 0;
    RAISE(account->seen, 1);
    chance = chance_of(*class_ratio);
    now = nothing = account->lost >> 63; /* 0, but the verifier does not know */
    if (filters) {
        struct terms terms = {UNSAID + nothing, UNSAID + nothing, UNSAID + nothing};
        struct comm comm = about->comm;
        if (filters & (FILTER_COMM | COUNT_COMM) && about->who == WHO_RUNS)
            bpf_get_current_comm(&comm, sizeof(comm));
        if (filters & FILTERS)
            apply_rules(about, flow, &comm, filters, &terms);
        if (!chance_by_rules(&terms, &chance)) {
            RAISE(account->filtered, 1);
            return 0;
        }
        chance = halved(chance, count_keys(about, flow, &comm, filters, &now));
    }
    if (!event_drawn(class, &chance)) {
        RAISE(account->sampled_out, 1);
        return 0;
    }
    return event_placed(bpf_ringbuf_reserve(MAP(events), size, 0), account, about, now, chance, size);
}

/* The same for a critical one: it has a ring of its own, and no rule, key or brake thins it. Only its class can be switched
 * off as a whole. */
INLINE struct event *event_reserve_critical(const struct subject *about, u64 size) {
    u32 class = about->class;
    struct account *account = map_lookup(MAP(account), &class);
    u32 *class_ratio = map_lookup(MAP(ratios), &class);
    if (!account || !class_ratio)
        return 0;
    RAISE(account->seen, 1);
    if (!*class_ratio) {
        RAISE(account->sampled_out, 1);
        return 0;
    }
    return event_placed(bpf_ringbuf_reserve(MAP(lifecycle), size, 0), account, about, 0, WHOLE, size);
}

/* Sends an event of event_reserve. The reader is woken by the first that it has not read, and again as each further eighth of
 * the ring fills: so it may let them gather, and no event of a flood has to wake anybody. */
INLINE void event_submit(void *event) {
    u64 length = (((struct event *)event)->size + 8 + 7) & ~7ULL, used = ring_query(MAP(events), 0);
    bpf_ringbuf_submit(event, used / (RING / 8) != (used - length) / (RING / 8) ? 2 /* BPF_RB_FORCE_WAKEUP */ : 0);
}

/* Sends an event of event_reserve_critical. */
INLINE void event_submit_critical(void *event) {
    bpf_ringbuf_submit(event, 0);
}

#endif
