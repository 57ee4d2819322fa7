/* What an event is about; what rules say of it, what is counted by key, and what was said of events like it.
 *
 * Cost: see README.md. A flood is one event over and over. So what was found out about one, for which up to twelve
 * hashes are asked, is kept per CPU for the next that is like it in all that was asked.
 */
#ifndef CNI_RULES_H
#define CNI_RULES_H

#include "common.h"

enum event_class { NETNS, VETH, CNI_RUN, PACKET_DROP, TCP_FAULT, EXEC, CONNECTION, CONNECTION_CLOSE, SYSCALL, CLASSES };

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
#define FILTER_FLOW (FILTER_PREFIX | FILTER_PORT | COUNT_PREFIX)

/* What one key (a namespace, a command, an address) sent, per CPU; critical classes are neither counted nor thinned by key.
 * Counts wrap: whoever reads them asks for differences. */
#define FIRST_COUNTED PACKET_DROP
struct key_load {
    u32 counts[6];
    u64 second; /* of the quota: its number in the upper half, what came in it in the lower; where there is no place in `counts` */
};
_Static_assert(CLASSES - FIRST_COUNTED <= 6, "a class has no place in struct key_load");

/* What rules and counts by key ask about an event, in words, since it is made and compared in registers: what nobody asks
 * about is 0. */
enum like {
    LIKE_COOKIE,
    LIKE_WHAT, /* inode of the namespace, class, kinds of rules and of keys that have to do with it: 32, 8, 8, 8 bits */
    LIKE_COMM,
    LIKE_SOURCE = LIKE_COMM + 2,
    LIKE_DESTINATION = LIKE_SOURCE + 2,
    LIKE_PORTS = LIKE_DESTINATION + 2, /* source, destination: 16 bits each */
    LIKE_WHO,                          /* PID, system call: 32 bits each */
    LIKE_CGROUP,
    LIKE_WORDS
};
#define CLASS_OF(like) ((like)[LIKE_WHAT] >> 32 & 15)
#define ASKED_OF(like) ((like)[LIKE_WHAT] >> 40 & FILTERS)
#define NETNS_OF(like) {.cookie = (like)[LIKE_COOKIE], .inum = (like)[LIKE_WHAT]}
#define COUNTED_OF(like) ((like)[LIKE_WHAT] >> 48 & COUNTS)

/* What the last event said of all that are like it: two cache lines, in places of each CPU's own. */
#define RULES_MET 9 /* kinds, of prefixes and ports two */
#define PENDING 16
struct verdict {
    u64 like[LIKE_WORDS];
    u64 chance;
    u32 generation; /* of the rules that were asked */
    u8 busy;
    u8 pending; /* events that are not in the counts of their keys yet */
    u8 filtered;
    u8 rules; /* that it met */
    u8 configured; /* of these */
    u16 met[RULES_MET]; /* their slots, each doubled, and 1 more where the rule is learned */
};
#define VERDICTS_OF_A_CPU (256 + 1)
_Static_assert(sizeof(struct verdict) == 128, "a verdict is two cache lines");

SHAPE(verdicts, u32, struct verdict);
SHAPE(filters, u32, u64);
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

/* One map lookup: in the lower half which filter maps have a rule for the class and what is counted of it, in the upper half
 * the generation: a number that is another one after every change of a rule or a ratio. */
INLINE u64 filters_in_use(u32 class) {
    u64 *flags = map_lookup(MAP(filters), &class);
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

/* ---- what is looked up: functions of rules.c, which all programs share ---- */

/* Adds what is pending to the counts of the learned rules and of the keys. */
static long (*settle)(struct verdict *verdict) = (void *)CALL_rules_settle;
/* Finds out what is said of events like this: from the class' ratio, which is in `chance`, to what comes of it. */
static long (*decide)(struct verdict *verdict) = (void *)CALL_rules_decide;
/* Counts one event for the configured rules that it met. */
static long (*count_matches)(struct verdict *verdict) = (void *)CALL_rules_matched;

struct quota {
    struct netns_id netns;
    u64 class;
    u64 now; /* for the answer: ns */
};
/* Counts the events of a namespace; the answer is by how many halvings the quota thins it: the n-th in a second (of 2^30 ns)
 * on this CPU, once it has had its quota m, by 1 + log2(n / m), at most 6. */
static long (*halvings_by_quota)(struct quota *quota) = (void *)CALL_rules_quota;

/* ---- what was said of events like this one ---- */

/* All ones where the bit is set, else 0: there are few branches in this, and few that the verifier has to follow apart. */
#define MASK(word, bit) (0 - (u64)!!((word) & (bit)))

INLINE void like_fill(u64 *like, const struct subject *about, const struct flow *flow, u64 filters) {
    u64 asked = filters & FILTERS, counted = filters >> 16 & COUNTS, commanded, own, other, either;
    if (about->who == WHO_IS_NOBODY) {
        asked &= ~(FILTER_PID | FILTER_COMM);
        counted &= ~(COUNT_COMM >> 16);
    }
    if (about->who != WHO_RUNS)
        asked &= ~FILTER_CGROUP;
    if (about->class != SYSCALL)
        asked &= ~FILTER_SYSCALL;
    if (!flow) {
        asked &= ~(FILTER_PREFIX | FILTER_PORT);
        counted &= ~(COUNT_PREFIX >> 16);
    }
    like[LIKE_COOKIE] = about->netns.cookie;
    like[LIKE_WHAT] = about->netns.inum | (u64)about->class << 32 | asked << 40 | counted << 48;
    if (asked & FILTER_PID)
        like[LIKE_WHO] = about->who == WHO_RUNS ? bpf_get_current_pid_tgid() >> 32 : about->pid;
    like[LIKE_WHO] |= (u64)about->syscall << 32 & MASK(asked, FILTER_SYSCALL);
    if (asked & FILTER_CGROUP)
        like[LIKE_CGROUP] = bpf_get_current_cgroup_id();
    if (about->who != WHO_IS_NOBODY) {
        struct comm comm = about->comm;
        if (about->who == WHO_RUNS)
            comm_of_current(&comm);
        commanded = MASK(asked | counted, FILTER_COMM); /* which is COUNT_COMM >> 16 */
        like[LIKE_COMM] = comm.words[0] & commanded;
        like[LIKE_COMM + 1] = comm.words[1] & commanded;
    }
    if (!flow)
        return;
    either = MASK(asked, FILTER_PREFIX);
    own = either | (about->class == PACKET_DROP ? MASK(counted, COUNT_PREFIX >> 16) : 0);
    other = either | (about->class != PACKET_DROP ? MASK(counted, COUNT_PREFIX >> 16) : 0);
    like[LIKE_SOURCE] = flow->source[0] & own;
    like[LIKE_SOURCE + 1] = flow->source[1] & own;
    like[LIKE_DESTINATION] = flow->destination[0] & other;
    like[LIKE_DESTINATION + 1] = flow->destination[1] & other;
    like[LIKE_PORTS] = (flow->source_port | (u64)flow->destination_port << 16) & MASK(asked, FILTER_PORT);
}
_Static_assert(FILTER_COMM == COUNT_COMM >> 16, "like_fill asks for both at once");

INLINE int is_about(const struct verdict *verdict, const u64 *like, u32 generation) {
    u64 differs = verdict->generation ^ generation;
#pragma unroll
    for (u32 i = 0; i < LIKE_WORDS; i++)
        differs |= verdict->like[i] ^ like[i];
    return !differs;
}

/* The place for what is said of events like this one: of two the one that has it, else the second, while what the first says
 * holds, so that two kinds of events that come in turns do not put each other out. A program in an interrupt may come between
 * any two steps of another: it takes the spare place where that one is at work in its own. The answer is 0 where that is taken
 * as well. */
INLINE struct verdict *place_of(const u64 *like, u64 hash, u32 generation) {
    struct verdict *verdict;
    u32 own = bpf_get_smp_processor_id() * VERDICTS_OF_A_CPU, slot;
#pragma unroll
    for (u32 i = 0; i < LIKE_WORDS; i++)
        hash += like[i] * (0x2c1b3c6d + 0x3c6ef36 * i);
    hash ^= hash >> 32;
    slot = own + ((u32)(hash * 0x9e3779b1U) >> 25 << 1);
    verdict = map_lookup(MAP(verdicts), &slot);
    if (verdict && verdict->generation == generation && !is_about(verdict, like, generation)) {
        slot++;
        verdict = map_lookup(MAP(verdicts), &slot);
    }
    if (!verdict || !verdict->busy)
        return verdict;
    slot = own + VERDICTS_OF_A_CPU - 1;
    verdict = map_lookup(MAP(verdicts), &slot);
    return verdict && !verdict->busy ? verdict : 0;
}
_Static_assert(VERDICTS_OF_A_CPU == 256 + 1, "place_of has eight bits and a spare place");

/* Says what becomes of an event by rules, class and keys; an event like one before, which is what a flood is made of, asks no
 * rule again. Such events count sixteen at a time for their keys and learned rules. The answer is 0 where the event is filtered. */
INLINE int judged(const struct subject *about, const struct flow *flow, u64 filters, u64 nothing, u64 *chance) {
    u64 like[LIKE_WORDS] = {};
    struct verdict *verdict;
    u32 filtered;
    int known;
    like_fill(like, about, flow, filters);
    verdict = place_of(like, nothing, filters >> 32);
    if (!verdict)
        return 0;
    verdict->busy = 1;
    BARRIER();
    known = is_about(verdict, like, filters >> 32);
    verdict->pending += known && !verdict->filtered;
    if (verdict->pending >= (known ? PENDING : 1))
        settle(verdict);
    if (!known) {
        __builtin_memcpy(verdict->like, like, sizeof(like));
        verdict->generation = filters >> 32;
        verdict->chance = *chance;
        decide(verdict);
        verdict->pending = !verdict->filtered;
    }
    if (verdict->configured)
        count_matches(verdict);
    *chance = verdict->chance;
    filtered = verdict->filtered;
    BARRIER();
    verdict->busy = 0;
    return !filtered;
}

#endif
