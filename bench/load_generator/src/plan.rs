//! What a run is told, the bodies of its requests and the ids in them.

use std::collections::HashMap;
use std::fmt::Write as _;

/// The first ids of a vocabulary are often special.
const FIRST_ID: u64 = 300;

/// The options of the command line.
pub struct Plan {
    pub address: String,
    model: String,
    pub vocabulary: u64,
    pub seed: u64,
    pub streams: u32,
    pub prompt_tokens: usize,
    pub output_tokens: usize,
    pub requests: Option<u64>,
    pub seconds: Option<u64>,
    is_streamed: bool,
    /// Prompt and output tokens of a long request.
    pub long: Option<(usize, usize)>,
}

impl Plan {
    /// Of words `name=value`; says which is missing, unknown or no number.
    pub fn parse(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut given = HashMap::new();
        for word in words {
            let (name, value) = word.split_once('=').ok_or_else(|| format!("{word} is not name=value"))?;
            given.insert(name.to_owned(), value.to_owned());
        }
        let mut take = |name: &str| given.remove(name);
        let number = |name: &str, text: Option<String>| -> Result<Option<u64>, String> {
            text.map(|text| text.parse().map_err(|_| format!("{name} is {text}, it must be a whole number")))
                .transpose()
        };
        let needed = |name: &str, value: Option<u64>| value.ok_or_else(|| format!("{name}=N is missing"));
        let size = |value: u64| usize::try_from(value).map_err(|_| format!("{value} is too large"));
        let address = take("address").ok_or("address=HOST:PORT is missing")?;
        let model = take("model").ok_or("model=NAME is missing")?;
        let mut numbers = HashMap::new();
        let names = ["vocabulary", "seed", "streams", "prompt", "output", "requests", "seconds", "stream", "long"];
        for name in names.into_iter().chain(["long_output"]) {
            numbers.insert(name, number(name, take(name))?);
        }
        if let Some(name) = given.keys().next() {
            return Err(format!("{name} is not known"));
        }
        let get = |name: &str| needed(name, numbers[name]);
        let plan = Self {
            address,
            model,
            vocabulary: get("vocabulary")?,
            seed: get("seed")?,
            streams: u32::try_from(get("streams")?).map_err(|_| "streams is too large")?,
            prompt_tokens: size(get("prompt")?)?,
            output_tokens: size(get("output")?)?,
            requests: numbers["requests"],
            seconds: numbers["seconds"],
            is_streamed: numbers["stream"] != Some(0),
            long: match numbers["long"] {
                Some(prompt) => Some((size(prompt)?, size(get("long_output")?)?)),
                None => None,
            },
        };
        if plan.requests.is_some() == plan.seconds.is_some() {
            return Err("give one of requests=N and seconds=N".to_owned());
        }
        if plan.vocabulary <= 2 * FIRST_ID {
            return Err(format!("vocabulary is {}, it must be above {}", plan.vocabulary, 2 * FIRST_ID));
        }
        Ok(plan)
    }

    /// The JSON of a request.
    pub fn body(&self, ids: &[u64], output_tokens: usize) -> String {
        let ids: Vec<String> = ids.iter().map(u64::to_string).collect();
        let mut body = format!(
            "{{\"model\":\"{}\",\"prompt\":[{}],\"max_tokens\":{output_tokens},\"temperature\":0,\"ignore_eos\":true",
            self.model,
            ids.join(",")
        );
        let rest = if self.is_streamed { ",\"stream\":true,\"stream_options\":{\"include_usage\":true}}" } else { "}" };
        write!(body, "{rest}").expect("a string takes everything");
        body
    }
}

/// Random ids, so that no cache has seen a prompt: SplitMix64 (Steele, Lea and Flood 2014).
pub struct Ids {
    state: u64,
    vocabulary: u64,
}

impl Ids {
    pub fn new(seed: u64, vocabulary: u64) -> Self {
        Self { state: seed, vocabulary }
    }

    /// So many ids, none of the first or last of the vocabulary.
    pub fn draw(&mut self, count: usize) -> Vec<u64> {
        (0..count).map(|_| FIRST_ID + self.next() % (self.vocabulary - FIRST_ID - 10)).collect()
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Plan, String> {
        Plan::parse(words.split(' ').map(str::to_owned))
    }

    const WORDS: &str = "address=a:1 model=m vocabulary=1000 seed=7 streams=2 prompt=3 output=4";

    #[test]
    fn a_plan_is_read_and_what_is_wrong_is_named() {
        let plan = parse(&format!("{WORDS} seconds=5 long=9 long_output=2")).expect("a whole plan");
        assert_eq!((plan.streams, plan.seconds, plan.long), (2, Some(5), Some((9, 2))));
        assert_eq!(parse(WORDS).err().as_deref(), Some("give one of requests=N and seconds=N"));
        assert_eq!(
            parse(&format!("{WORDS} requests=x")).err().as_deref(),
            Some("requests is x, it must be a whole number")
        );
        assert_eq!(parse(&format!("{WORDS} requests=1 more=1")).err().as_deref(), Some("more is not known"));
    }

    #[test]
    fn ids_are_within_the_vocabulary_and_differ_from_call_to_call() {
        let mut ids = Ids::new(1, 1_000);
        let (first, second) = (ids.draw(500), ids.draw(500));
        assert_ne!(first, second);
        assert!(first.iter().all(|id| (300..990).contains(id)));
    }
}
