/* What an event's path calls: the judgement by rules and keys, and the brake.
 *
 * As what is in rules.c it is compiled once, and the loader puts it behind each program.
 * Cost: see README.md. A flood is one event over and over. So what was found out about one, for which up to twelve
 * hashes are asked, is kept per CPU for the next that is like it in all that was asked.
 */
#include "rules.h"

SHAPE(fullest, u32, u64);

/* ---- what was said of events like this one ---- */

/* All ones where the bit is set, else 0: there are few branches in this, and few that the verifier has to follow apart. */
#define MASK(word, bit) (0 - (u64)!!((word) & (bit)))

INLINE void like_fill(u64 *like, const struct subject *about, u64 filters) {
    const struct flow *flow = &about->flow;
    u64 asked = filters & FILTERS, counted = filters >> 16 & COUNTS, commanded, own, other, either;
    if (about->who == WHO_IS_NOBODY) {
        asked &= ~(FILTER_PID | FILTER_COMM);
        counted &= ~(COUNT_COMM >> 16);
    }
    if (about->who != WHO_RUNS)
        asked &= ~FILTER_CGROUP;
    if (about->class != SYSCALL)
        asked &= ~FILTER_SYSCALL;
    if (!flow->family) {
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
INLINE struct verdict *place_of(const u64 *like, struct subject *about, u64 hash) {
    struct verdict *verdict;
    u32 own = bpf_get_smp_processor_id() * VERDICTS_OF_A_CPU, generation = about->filters >> 32, slot;
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
    about->slot = slot;
    if (!verdict || !verdict->busy)
        return verdict;
    about->slot = slot = own + VERDICTS_OF_A_CPU - 1;
    verdict = map_lookup(MAP(verdicts), &slot);
    return verdict && !verdict->busy ? verdict : 0;
}
_Static_assert(VERDICTS_OF_A_CPU == 256 + 1, "place_of has eight bits and a spare place");

int events_judge(struct subject *about) {
    u64 like[LIKE_WORDS] = {}, filters = about->filters;
    struct verdict *verdict;
    if (!(filters & (FILTERS | COUNTS << 16)))
        return by_quota(about);
    like_fill(like, about, filters);
    verdict = place_of(like, about, NOTHING(about->filters));
    if (!verdict)
        return 0;
    verdict->busy = 1;
    BARRIER();
    if (is_about(verdict, like, filters >> 32)) {
        verdict->pending += !verdict->filtered;
        if (verdict->pending >= PENDING)
            settle(verdict);
        return judged(about, verdict);
    }
    if (verdict->pending)
        settle(verdict);
    __builtin_memcpy(verdict->like, like, sizeof(like));
    verdict->generation = filters >> 32;
    return UNDECIDED;
}

/* ---- the brake ---- */

/* Halvings by the fill of the ring: from a quarter on one more for each eighth, in the last eighth for each 64th; warnings
 * begin one later, errors two. What is not sent so is sampled out, with its weight on what is sent: it takes a reader that
 * stands still for seconds to fill the ring with what nobody can read. */
INLINE u32 halvings_by_fill(u32 class, u64 used) {
    u32 zero = 0, steps, begin = class == PACKET_DROP ? 3 : class == TCP_FAULT ? 2 : 1;
    u64 *fullest;
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

int events_brake(struct subject *about) {
    u32 class = about->class;
    struct account *account = map_lookup(MAP(account), &class);
    u64 used = ring_query(MAP(events), 0 /* BPF_RB_AVAIL_DATA */);
    if (!account)
        return 0;
    about->wake = (account->used / (RING / 8) - used / (RING / 8)) >> 63 << 1; /* BPF_RB_FORCE_WAKEUP: fuller by an eighth */
    about->now = bpf_ktime_get_ns();
    about->chance = halved(about->chance, halvings_by_fill(class, used));
    account->used = used;
    return 0;
}
