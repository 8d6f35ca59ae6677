//! A fleet's caches and the prompts that meet them, as numbers: conversations of 64 keys of which the first 8 are one of a
//! hundred system prompts, each conversation on one replica and each fifth on two. All figures follow from the seed.

/// Keys of a prompt.
pub const PROMPT_KEYS: usize = 64;
/// Keys of a system prompt.
const SHARED_KEYS: usize = 8;
const SYSTEM_PROMPTS: u64 = 100;

/// Sizes of the fleet.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    pub replicas: u32,
    pub keys: u64,
    pub seed: u64,
}

/// A well mixed function of a number (the finalizer of splitmix64).
pub fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl Workload {
    /// How many conversations there are.
    pub fn conversations(&self) -> u64 {
        self.keys / (PROMPT_KEYS - SHARED_KEYS) as u64
    }

    /// The keys of a conversation, whether anybody holds it or not.
    pub fn chain(&self, conversation: u64) -> Vec<u64> {
        let system = mix(self.seed ^ conversation) % SYSTEM_PROMPTS;
        let own = (SYSTEM_PROMPTS + conversation) << 8;
        (0..PROMPT_KEYS as u64)
            .map(|at| mix(self.seed ^ if at < SHARED_KEYS as u64 { system << 8 | at } else { own | at }))
            .collect()
    }

    /// Who holds a conversation.
    pub fn holders(&self, conversation: u64) -> impl Iterator<Item = u32> + use<> {
        let drawn = mix(self.seed.wrapping_add(conversation).rotate_left(20));
        let second = conversation.is_multiple_of(5).then_some((drawn >> 32) as u32 % self.replicas);
        [Some(drawn as u32 % self.replicas), second].into_iter().flatten()
    }

    /// The prompts: three of four go on with a conversation of which 8 to 63 keys are held, the fourth is new.
    pub fn prompts(&self, count: u64) -> Vec<Vec<u64>> {
        (0..count)
            .map(|number| {
                let drawn = mix(self.seed.rotate_left(7) ^ number);
                let fresh = self.conversations() + number;
                if drawn.is_multiple_of(4) {
                    return self.chain(fresh);
                }
                let mut prompt = self.chain((drawn >> 8) % self.conversations());
                let held = SHARED_KEYS + (drawn >> 40) as usize % (PROMPT_KEYS - SHARED_KEYS);
                for (at, key) in prompt.iter_mut().enumerate().skip(held) {
                    *key = mix(*key ^ fresh ^ at as u64);
                }
                prompt
            })
            .collect()
    }
}
