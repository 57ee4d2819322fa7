/* What an event is about, what rules say of it, and what is counted by key: for events.h and events.c, which ask, and rules.c,
 * which looks up.
 */
#ifndef CNI_RULES_H
#define CNI_RULES_H

#include "common.h"

enum event_class { NETNS, VETH, CNI_RUN, PACKET_DROP, TCP_FAULT, EXEC, CONNECTION, CONNECTION_CLOSE, SYSCALL, CLASSES };

/* Who is behind an event: the running process, one that is known from before, or nobody. Rules by PID and command hold
 * for the first two alone, by cgroup for the first. */
enum who { WHO_RUNS, WHO_IS_KNOWN, WHO_IS_NOBODY };
_Static_assert(WHO_IS_NOBODY >> 1 == 1 && WHO_IS_KNOWN >> 1 == 0, "asked_of knows nobody by a bit");

/* What an event is about; all that a filter may ask for. What programs give as a constant has words of its own: of these the
 * verifier knows, in the function that is called, what they are. */
struct subject {
    struct netns_id netns;
    u64 class;
    u64 who;
    u32 kind;
    union {
        u32 pid;     /* with WHO_IS_KNOWN */
        u32 syscall; /* of class SYSCALL */
    };
    struct comm comm;
    struct flow flow; /* of family 0 where there is none */
    /* The rest is not for programs to fill in. */
    const u64 *like; /* what was asked about it: LIKE_WORDS */
    u64 filters; /* the word of the map filters */
    u64 chance;
    u64 now;  /* ns; 0: nobody has asked */
    u32 wake; /* how the ring is to wake its reader */
    u32 slot; /* of the place that it is looked for in; to begin with its counter's, 0: it has none */
};

/* Of what sort an event is. By value: what a program knows as a constant is one wherever it is asked for. */
struct sort {
    u64 class;
    u64 who;
    u64 family;  /* of its flow, 0: it has none */
    u64 arrived; /* 1: it is counted by the flow's source, as dropped packets are, else by its destination */
};

/* In the lower half which filter maps have a rule for the class and what is counted of it, in the upper half the generation: a
 * number that is another one after every change of a configured rule, or of a ratio while there is one. */
SHAPE(filters, u32, u64);

#define ALL 0xffffffffU

/* Chances are in 1/2^32, so that 1 has a number of its own. There are no branches in this arithmetic, and nothing in it that
 * the verifier knows: else it would follow each combination of what rules may have said, which are too many. */
#define WHOLE (1ULL << 32)
INLINE u64 chance_of(u32 ratio) {
    return (u64)ratio + (((u64)ratio + 1) >> 32);
}

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

/* Events that a rule met, by its origin: configured, learned. */
struct matches {
    u64 by_origin[2];
};

struct prefix {
    u32 length; /* bits, of 128 */
    u8 address[16];
};

enum filter {
    FILTER_PID = 1,
    FILTER_COMM = 2,
    FILTER_PREFIX = 4,
    FILTER_PORT = 8,
    FILTER_SYSCALL = 16,
    FILTER_NETNS = 32,
    FILTER_CGROUP = 64,
    FILTER_OWN = 128 /* beside FILTER_PREFIX: it is not learned rules alone, which ask for the address that is counted by */
};
#define FILTERS 255
#define LONG (FILTER_PID | FILTER_OWN | FILTER_PORT | FILTER_SYSCALL | FILTER_CGROUP)
/* Beside them in the same word: what is counted by key. */
enum counting { COUNT_NETNS = 1 << 16, COUNT_COMM = 1 << 17, COUNT_PREFIX = 1 << 18, COUNT_QUOTA = 1 << 19 };
#define COUNTS (COUNT_NETNS | COUNT_COMM | COUNT_PREFIX)

/* What of these has to do with an event. */
INLINE u64 asked_of(u64 filters, struct sort sort) {
    u64 somebody = (sort.who >> 1) - 1, flow = 0 - ((sort.family + 63) >> 6); /* all ones, else 0: address families are below 64 */
    return filters & (FILTER_NETNS | COUNT_NETNS | FILTER_SYSCALL | FILTER_CGROUP |
                      ((FILTER_PID | FILTER_COMM | COUNT_COMM) & somebody) |
                      ((FILTER_PREFIX | FILTER_OWN | FILTER_PORT | COUNT_PREFIX) & flow));
}

/* What one key (a namespace, a command, an address) sent, per CPU; critical classes are neither counted nor thinned by key.
 * Counts wrap: whoever reads them asks for differences. */
#define FIRST_COUNTED PACKET_DROP
struct key_load {
    u32 counts[6];
    u64 second; /* of the quota: its number in the upper half, what came in it in the lower; where its counter has no place */
};
_Static_assert(CLASSES - FIRST_COUNTED <= 6, "a class has no place in struct key_load");

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

/* ---- what the rules say ---- */

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

/* ---- what is looked up: functions of rules.c, which all programs share ---- */

/* Adds what is pending to the counts of the learned rules and of the keys. */
static long (*settle)(struct place *place) = (void *)CALL_rules_settle;
/* Counts one event for the configured rules that it met. */
static long (*count_matches)(struct place *place) = (void *)CALL_rules_matched;

/* Counts the events of a namespace; the answer is by how many halvings the quota thins it: the n-th in a second (of 2^30 ns)
 * on this CPU, once it has had its quota m, by 1 + log2(n / m), at most 6. */
static long (*halvings_by_quota)(const struct subject *about) = (void *)CALL_rules_quota;

/* The quota alone. */
INLINE int by_quota(struct subject *about) {
    if (SELDOM(about->filters & COUNT_QUOTA) && about->netns.inum)
        about->chance = halved(about->chance, halvings_by_quota(about));
    return 1;
}

/* What was said at a place, which is free again after this: 0: the event is filtered. */
INLINE int judged(struct subject *about, struct place *place) {
    u32 special = place->special, ratio = place->ratio;
    place->pending += ~special & FILTERED;
    if (special & CONFIGURED)
        count_matches(place);
    BARRIER();
    place->busy = 0;
    if (special & FILTERED)
        return 0;
    about->chance = special ? chance_of(ratio) : smaller(about->chance, chance_of(ratio));
    return by_quota(about);
}

#endif
