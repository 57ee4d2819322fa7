/* Places, of each CPU's own: exact counters, and beside each what rules said of the last event that was counted there.
 *
 * Where caches are cold, and so are those of the instructions, each line counts that a program touches. A hash takes half a dozen;
 * here what counts an event and what says what becomes of its like is in one.
 */
#ifndef CNI_PLACES_H
#define CNI_PLACES_H

/* What rules and counts by key ask about an event, in words, since it is made and compared in registers: what nobody asks
 * about is 0. */
enum like {
    LIKE_COOKIE,
    LIKE_WHAT, /* inode of the namespace, class, what it is counted by and LONG kinds that are asked: 32, 8, 24 bits */
    LIKE_KEY,  /* the address that is counted by (of a dropped packet its sender, of a socket its peer), else the command */
    LIKE_SHORT = LIKE_KEY + 2,
    LIKE_COMM = LIKE_SHORT, /* the command, in any case */
    LIKE_WORDS = LIKE_COMM + 2
};
/* What LONG kinds of rules alone ask: where there is none of these, it is left as it is. */
enum longer {
    LONGER_OWN,                   /* the other address */
    LONGER_WHO = LONGER_OWN + 2,  /* PID; system call, or ports: source, destination: 32 bits, 2 x 16 */
    LONGER_CGROUP,
    LONGER_WORDS
};
#define CLASS_OF(like) ((like)[LIKE_WHAT] >> 32 & 15)
#define REST_OF(like) ((like)[LIKE_WHAT] >> 40) /* bits of enum filter and enum counting */
#define INUM_OF(like) ((u32)(like)[LIKE_WHAT])
#define NETNS_OF(like) {.cookie = (like)[LIKE_COOKIE], .inum = INUM_OF(like)}

/* A counter; what the last event said of all that are like it, and how many there were: two cache lines, of which the second is
 * for what is asked by many kinds of rules, and for what met one. A place with a counter is its counter's until user space takes
 * it back, when the namespace is gone; the events that it counts are of that namespace. User space reads `pending`, while
 * the place is not busy, and adds it to the counts by key; and it makes `generation` 0 where a learned rule has changed that has
 * to do with the place. */
#define RULES_MET 8 /* kinds, of prefixes and ports two; no event has a system call and a flow */
struct place {
    u64 like[LIKE_SHORT]; /* with a counter the first is its cookie, the lower half of the second its inode */
    u64 count;
    u32 what;
    u32 counter;    /* 0: free. Written last. */
    u32 pending;    /* events that are not in the counts of their keys and learned rules */
    u32 generation; /* of the rules that were asked; 0: to be decided anew */
    u32 ratio;      /* as in struct event; a ceiling for the class' ratio, where no configured rule was met */
    u8 busy;        /* a program is at work in it; `count` is raised nonetheless */
    u8 special;     /* FILTERED, CONFIGURED: something is to be done for each event */
    u8 learned;     /* rules that it met */
    u8 rules;       /* likewise, the configured ones too */
    u64 comm[LIKE_WORDS - LIKE_COMM];
    u64 longer[LONGER_WORDS];
    u16 met[RULES_MET]; /* their slots, each doubled, and 1 more where the rule is learned */
};
#define FILTERED 1
#define CONFIGURED 2
_Static_assert(sizeof(struct place) == 128, "a place is two cache lines");
_Static_assert(__builtin_offsetof(struct place, comm) == 64, "what is asked of each event is in the first");
SHAPE(places, u32, struct place);

/* The places of a CPU: those that have no counter and a spare one, then those that have. */
#define PLACES_WITHOUT (1024 + 1)
#define PLACES_WITH 1024
#define PLACES_OF_A_CPU (PLACES_WITHOUT + PLACES_WITH)

/* ---- exact counters ---- */

/* What is counted: something in a namespace. */
enum counter { COUNT_DROPS = 1, COUNT_TCP, COUNT_QUOTAS };
struct count_key {
    struct netns_id netns;
    u32 what;
    u32 counter;
};

SHAPE(counted, struct count_key, u64); /* what found no place */

/* Of two places side by side the first. */
INLINE u32 count_slot(const struct count_key *key) {
    u64 hash = ((key->netns.cookie ^ key->netns.inum) * 0x9e3779b97f4a7c15ULL ^ key->what) * 0x9e3779b97f4a7c15ULL;
    return bpf_get_smp_processor_id() * PLACES_OF_A_CPU + PLACES_WITHOUT + (hash >> 55 << 1);
}

INLINE int is_count_of(const struct place *at, const struct count_key *key) {
    return !((at->like[LIKE_COOKIE] ^ key->netns.cookie) | (INUM_OF(at->like) ^ key->netns.inum) | (at->what ^ key->what) |
             (at->counter ^ key->counter)); /* one branch, not four */
}

static long (*count_elsewhere)(const struct count_key *key) = (void *)CALL_count_slowly; /* of rules.c */

/* Counts one more. The answer is 1 where that is the first, 0 else. `where`: the slot of its place, or of the one that it would take
 * first. */
INLINE int count(const struct count_key *key, u32 *where) {
    u32 slot = count_slot(key);
    struct place *at = map_lookup(MAP(places), &slot);
    if (SELDOM(!at))
        return 0;
    *where = slot + NOTHING(key->netns.cookie);
    if (SELDOM(!is_count_of(at, key))) {
        slot++;
        at = map_lookup(MAP(places), &slot);
        if (!at || !is_count_of(at, key))
            return count_elsewhere(key);
        ++*where;
    }
    RAISE(at->count, 1);
    return 0;
}

/* ---- what was said of events like this one ---- */

INLINE u64 unlike(const struct place *place, const u64 *like) {
    u64 differs = 0;
#pragma unroll
    for (u32 i = 0; i < LIKE_SHORT; i++)
        differs |= place->like[i] ^ like[i];
    return differs;
}

INLINE u64 uncommanded(const struct place *place, const u64 *like) {
    return place->comm[0] ^ like[LIKE_COMM] | place->comm[1] ^ like[LIKE_COMM + 1];
}

/* Where an event is looked for: at its counter's place, unless it has none or LONG kinds are asked; in an even one and in an odd one.
 * They have nothing to do with each other: so few keys find all of them taken, and what is in the first is safe from those that
 * find theirs taken. The spare one is for who finds another at work. */
enum way { WAY_COUNTER, WAY_EVEN, WAY_ODD, WAY_SPARE };
INLINE u32 places_of(const u64 *like, u64 hash) {
    hash += (like[LIKE_COOKIE] ^ like[LIKE_COMM]) * 0x2c1b3c6d;
    hash += (like[LIKE_WHAT] ^ like[LIKE_COMM + 1] ^ like[LIKE_KEY]) * 0x33a91ad9;
    hash += like[LIKE_KEY + 1] * 0x3b36f945;
    hash ^= hash >> 32;
    return hash * 0x9e3779b1U;
}
INLINE u32 place_of(u32 places, u32 way) {
    u32 place = way == WAY_SPARE ? PLACES_WITHOUT - 1 : way == WAY_ODD ? places >> 11 & 1022 | 1 : places >> 22 & ~1U;
    return bpf_get_smp_processor_id() * PLACES_OF_A_CPU + place;
}
_Static_assert(PLACES_WITHOUT == 1024 + 1, "place_of has ten bits, and there is a spare place");

#endif
