/* What rules say of an event, what is counted by key, and what was said of events like it: between events.c, which asks, and
 * rules.c, which looks up.
 */
#ifndef CNI_RULES_H
#define CNI_RULES_H

#include "events.h"

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
    FILTER_CGROUP = 64
};
#define FILTERS 127
/* Beside them in the same word: what is counted by key. */
enum counting { COUNT_NETNS = 1 << 16, COUNT_COMM = 1 << 17, COUNT_PREFIX = 1 << 18, COUNT_QUOTA = 1 << 19 };
#define COUNTS 7 /* of the first three, shifted down */

/* What one key (a namespace, a command, an address) sent, per CPU; critical classes are neither counted nor thinned by key.
 * Counts wrap: whoever reads them asks for differences. */
#define FIRST_COUNTED PACKET_DROP
struct key_load {
    u32 counts[6];
    u64 second; /* of the quota: its number in the upper half, what came in it in the lower; where there is no place in `counts` */
};
_Static_assert(CLASSES - FIRST_COUNTED <= 6, "a class has no place in struct key_load");

/* What rules and counts by key ask about an event, in words, since it is made and compared in registers: what nobody asks
 * about is 0. From LIKE_OWN on is what LONG kinds of rules alone ask: where there is none of these, that is left as it is. */
enum like {
    LIKE_COOKIE,
    LIKE_WHAT, /* inode of the namespace, class, kinds of rules and of keys that have to do with it: 32, 8, 8, 8 bits */
    LIKE_COMM,
    LIKE_PEER = LIKE_COMM + 2, /* the address that is counted by: of a dropped packet its sender, of a socket its peer */
    LIKE_OWN = LIKE_PEER + 2,  /* the other one */
    LIKE_PORTS = LIKE_OWN + 2, /* source, destination: 16 bits each */
    LIKE_WHO,                  /* PID, system call: 32 bits each */
    LIKE_CGROUP,
    LIKE_WORDS
};
#define LIKE_SHORT LIKE_OWN
#define LONG (FILTER_PID | FILTER_PREFIX | FILTER_PORT | FILTER_SYSCALL | FILTER_CGROUP)
#define CLASS_OF(like) ((like)[LIKE_WHAT] >> 32 & 15)
#define ASKED_OF(like) ((like)[LIKE_WHAT] >> 40 & FILTERS)
#define NETNS_OF(like) {.cookie = (like)[LIKE_COOKIE], .inum = (like)[LIKE_WHAT]}
#define COUNTED_OF(like) ((like)[LIKE_WHAT] >> 48 & COUNTS)

/* What the last event said of all that are like it: two cache lines, in places of each CPU's own, of which the second is for
 * LONG kinds of rules, and for what met a rule. Where caches are cold, and so are those of the instructions, each line counts. */
#define RULES_MET 9 /* kinds, of prefixes and ports two */
#define FEWEST_SETTLED 16 /* at a time; then twice as many each time, up to */
#define MOST_SETTLED 64
#define FILTERED (~0ULL)
struct verdict {
    u64 like[LIKE_SHORT];
    u64 chance;     /* or FILTERED */
    u32 generation; /* of the rules that were asked */
    u8 busy;
    u8 pending; /* events that are not in the counts of their keys yet */
    u8 settled; /* how many are added to these at a time */
    u8 configured; /* rules that it met */
    u64 longer[LIKE_WORDS - LIKE_SHORT];
    u16 met[RULES_MET]; /* their slots, each doubled, and 1 more where the rule is learned */
    u8 rules; /* that it met, the learned ones too */
};
#define VERDICTS_OF_A_CPU (512 + 1)
_Static_assert(sizeof(struct verdict) == 128, "a verdict is two cache lines");
_Static_assert(__builtin_offsetof(struct verdict, longer) == 64, "what is asked of each event is in the first");

SHAPE(verdicts, u32, struct verdict);
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
static long (*settle)(struct verdict *verdict) = (void *)CALL_rules_settle;
/* Counts one event for the configured rules that it met. */
static long (*count_matches)(struct verdict *verdict) = (void *)CALL_rules_matched;

/* Counts the events of a namespace; the answer is by how many halvings the quota thins it: the n-th in a second (of 2^30 ns)
 * on this CPU, once it has had its quota m, by 1 + log2(n / m), at most 6. */
static long (*halvings_by_quota)(const struct subject *about) = (void *)CALL_rules_quota;

/* The quota alone. */
INLINE int by_quota(struct subject *about) {
    if (SELDOM(about->filters & COUNT_QUOTA) && about->netns.inum)
        about->chance = halved(about->chance, halvings_by_quota(about));
    return 1;
}

/* What a verdict says, whose place is free again after this: 0: the event is filtered. */
INLINE int judged(struct subject *about, struct verdict *verdict) {
    u64 chance = verdict->chance;
    if (SELDOM(verdict->configured))
        count_matches(verdict);
    BARRIER();
    verdict->busy = 0;
    about->chance = chance;
    return SELDOM(chance == FILTERED) ? 0 : by_quota(about);
}

#endif
