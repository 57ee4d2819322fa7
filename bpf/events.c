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

INLINE void like_fill(u64 *like, const struct subject *about, u64 asked, u64 counted) {
    const struct flow *flow = &about->flow;
    const u64 *peer = about->class == PACKET_DROP ? flow->source : flow->destination;
    u64 commanded = MASK(asked | counted, FILTER_COMM), addressed = MASK(asked | counted, FILTER_PREFIX);
    struct comm *comm = (struct comm *)&like[LIKE_COMM];
    if (about->who == WHO_RUNS)
        comm_of_current(comm);
    else
        *comm = about->comm;
    comm->words[0] &= commanded;
    comm->words[1] &= commanded;
    like[LIKE_COOKIE] = about->netns.cookie;
    like[LIKE_WHAT] = about->netns.inum | (u64)about->class << 32 | asked << 40 | counted << 48;
    like[LIKE_PEER] = peer[0] & addressed;
    like[LIKE_PEER + 1] = peer[1] & addressed;
}
_Static_assert(FILTER_COMM == COUNT_COMM >> 16 && FILTER_PREFIX == COUNT_PREFIX >> 16, "like_fill asks for both at once");

#define HASHED(like, i) ((like)[i] * (0x2c1b3c6d + 0x3c6ef36 * (i)))

/* What rules of LONG kinds ask; the answer is a hash of it. */
INLINE u64 like_fill_longer(u64 *like, const struct subject *about, u64 asked) {
    u64 hash = 0;
    const struct flow *flow = &about->flow;
    const u64 *own = about->class == PACKET_DROP ? flow->destination : flow->source;
    u64 addressed = MASK(asked, FILTER_PREFIX);
    like[LIKE_WHO] = (u64)about->syscall << 32 & MASK(asked, FILTER_SYSCALL);
    if (asked & FILTER_PID)
        like[LIKE_WHO] |= about->who == WHO_RUNS ? tgid_of_current() : about->pid;
    like[LIKE_CGROUP] = asked & FILTER_CGROUP ? cgroup_of_current() : 0;
    like[LIKE_OWN] = own[0] & addressed;
    like[LIKE_OWN + 1] = own[1] & addressed;
    like[LIKE_PORTS] = (flow->source_port | (u64)flow->destination_port << 16) & MASK(asked, FILTER_PORT);
#pragma unroll
    for (u32 i = LIKE_SHORT; i < LIKE_WORDS; i++)
        hash += HASHED(like, i);
    return hash;
}

/* 0 where the verdict is about events that are like this one in all that was asked. */
INLINE u64 unlike(const struct verdict *verdict, const u64 *like, u64 asked) {
    u64 differs = 0;
#pragma unroll
    for (u32 i = 0; i < LIKE_SHORT; i++)
        differs |= verdict->like[i] ^ like[i];
    if (SELDOM(asked & LONG)) {
#pragma unroll
        for (u32 i = LIKE_SHORT; i < LIKE_WORDS; i++)
            differs |= verdict->longer[i - LIKE_SHORT] ^ like[i];
    }
    return differs;
}

INLINE u32 first_place(const u64 *like, u64 hash) {
#pragma unroll
    for (u32 i = 0; i < LIKE_SHORT; i++)
        hash += HASHED(like, i);
    hash ^= hash >> 32;
    return (u32)(hash * 0x9e3779b1U) >> 24 << 1;
}

/* What is said of events like this one, taken for this program alone: of two places the one that has it, else the second, while
 * what the first says holds, so that two kinds of events that come in turns do not put each other out. A program in an interrupt
 * may come between any two steps of another: it takes the spare place where that one is at work in its own. The answer is 0
 * where that is taken as well. `differs` is 0 where the place has it. */
INLINE struct verdict *place_taken(const u64 *like, u64 asked, struct subject *about, u64 hash, u64 *differs) {
    struct verdict *verdict;
    u32 own = bpf_get_smp_processor_id() * VERDICTS_OF_A_CPU, generation = about->filters >> 32, slot;
    slot = own + first_place(like, hash);
#pragma clang loop unroll(disable)
    for (u32 way = 0; way < 3; way++) {
        verdict = map_lookup(MAP(verdicts), &slot);
        if (SELDOM(!verdict))
            return 0;
        if (SELDOM(verdict->busy && way == 2))
            return 0;
        if (SELDOM(verdict->busy)) {
            slot = own + VERDICTS_OF_A_CPU - 1;
            way = 1;
            continue;
        }
        verdict->busy = 1;
        BARRIER();
        *differs = unlike(verdict, like, asked);
        about->slot = slot;
        if (!*differs || way || verdict->generation != generation)
            return verdict;
        BARRIER();
        verdict->busy = 0;
        slot++;
    }
    return 0;
}
_Static_assert(VERDICTS_OF_A_CPU == 512 + 1, "first_place has nine bits, and there is a spare place");

int events_judge(struct subject *about) {
    u64 like[LIKE_WORDS], filters = about->filters, asked = filters & FILTERS, counted = filters >> 16 & COUNTS;
    u64 differs = 1, hash = NOTHING(about->filters), ruled;
    u32 generation = filters >> 32;
    struct verdict *verdict;
    if (about->who == WHO_IS_NOBODY) {
        asked &= ~(FILTER_PID | FILTER_COMM);
        counted &= ~(COUNT_COMM >> 16);
    }
    if (about->who != WHO_RUNS)
        asked &= ~FILTER_CGROUP;
    if (about->class != SYSCALL)
        asked &= ~FILTER_SYSCALL;
    if (!about->flow.family) {
        asked &= ~(FILTER_PREFIX | FILTER_PORT);
        counted &= ~(COUNT_PREFIX >> 16);
    }
    if (!(asked | counted))
        return by_quota(about);
    like_fill(like, about, asked, counted);
    if (SELDOM(asked & LONG))
        hash += like_fill_longer(like, about, asked);
    verdict = place_taken(like, asked, about, hash, &differs);
    if (SELDOM(!verdict))
        return 0;
    ruled = MASK(asked, FILTERS);
    if (SELDOM(differs | ((verdict->generation ^ generation) & ruled))) {
        if (verdict->pending)
            settle(verdict);
        verdict->settled = FEWEST_SETTLED;
        verdict->configured = verdict->rules = 0;
        __builtin_memcpy(verdict->like, like, sizeof(verdict->like));
        if (asked & LONG)
            __builtin_memcpy(verdict->longer, like + LIKE_SHORT, sizeof(verdict->longer));
        verdict->generation = generation;
        if (asked)
            return UNDECIDED;
    }
    verdict->generation = generation;
    verdict->chance = (verdict->chance & ruled) | (about->chance & ~ruled); /* nothing to decide, whatever has changed */
    verdict->pending += verdict->chance != FILTERED;
    if (SELDOM(verdict->pending >= verdict->settled))
        settle(verdict);
    return judged(about, verdict);
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
