//! The instruction level that kernels run at: detected once per process, forceable downward.
//! A kernel is one generic struct over [`Simd`]; [`Level::run`] compiles it once per level and jumps to the right copy.
//! The crate reads no environment itself: the caller passes the value of `LLMSCALE_CPU_LEVEL` to [`Level::from_environment`].
//! The level is part of the numerics id, because kernels other than the sampler give other last bits at another level.
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "entering a function compiled for detected instructions")
)]

use crate::simd::{Portable, Simd};
use core::fmt;
use std::sync::OnceLock;

/// Instruction level, ordered from the least to the most capable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Plain Rust, vectorised by the compiler for the target's baseline.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with dot products of bfloat16 (BF16) and of bytes (VNNI).
    Avx512Bf16,
}

/// A level name that cannot be honoured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LevelError {
    /// The name is none of the known ones.
    Unknown(String),
    /// The level exists, but this machine lacks its instructions.
    NotAvailable {
        /// The level asked for.
        asked: Level,
        /// The best level of this machine.
        detected: Level,
    },
}

impl fmt::Display for LevelError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(name) => write!(
                formatter,
                "CPU level \"{name}\" is unknown. Use one of portable, avx2, avx512, avx512bf16, or leave it unset."
            ),
            Self::NotAvailable { asked, detected } => write!(
                formatter,
                "CPU level \"{asked}\" needs instructions that this machine lacks; its best level is \"{detected}\". \
                 A level can be forced downward only."
            ),
        }
    }
}

impl std::error::Error for LevelError {}

impl fmt::Display for Level {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// A computation written once over [`Simd`] and compiled for every level.
/// `run` must be `#[inline(always)]`, as must all generic code it calls: otherwise that code is compiled for the baseline.
pub(crate) trait Kernel {
    /// What the computation returns.
    type Output;
    /// Performs the computation with the instructions that `simd` proves to exist.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

impl Level {
    /// Every level, from the least to the most capable.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// The name used in configuration, logs and the numerics id.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
        }
    }

    /// The best level of this machine. Detected at the first call and remembered.
    pub fn detected() -> Self {
        static DETECTED: OnceLock<Level> = OnceLock::new();
        *DETECTED.get_or_init(detect)
    }

    /// The levels that this machine can run, from the least to the most capable.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|&level| level <= Self::detected())
    }

    /// The level named by the value of `LLMSCALE_CPU_LEVEL`, or the detected one where it is unset or empty.
    pub fn from_environment(value: Option<&str>) -> Result<Self, LevelError> {
        let detected = Self::detected();
        let Some(name) = value.map(str::trim).filter(|name| !name.is_empty()) else {
            return Ok(detected);
        };
        let asked = Self::ALL
            .into_iter()
            .find(|level| level.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| LevelError::Unknown(name.to_owned()))?;
        if asked > detected { Err(LevelError::NotAvailable { asked, detected }) } else { Ok(asked) }
    }

    /// Runs a kernel at this level.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        assert!(self <= Self::detected(), "level {self} was not detected on this machine");
        match self {
            Self::Portable => kernel.run(Portable),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: detection found AVX2 and FMA.
            Self::Avx2 => unsafe { entry::avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: detection found AVX-512 F, BW, DQ and VL.
            Self::Avx512 => unsafe { entry::avx512(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: detection found AVX-512 F, BW, DQ, VL, BF16 and VNNI.
            Self::Avx512Bf16 => unsafe { entry::avx512_bf16(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("only the portable level exists on this architecture"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let dots = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni");
    match (avx2, avx512, dots) {
        (_, true, true) => Level::Avx512Bf16,
        (_, true, false) => Level::Avx512,
        (true, false, _) => Level::Avx2,
        (false, ..) => Level::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}

#[cfg(target_arch = "x86_64")]
mod entry {
    use super::Kernel;
    use crate::simd::{Avx2, Avx512, Avx512Bf16};

    /// # Safety
    /// The machine must have AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller promises the instructions that the token stands for.
        kernel.run(unsafe { Avx2::assume() })
    }

    /// # Safety
    /// The machine must have AVX-512 F, BW, DQ and VL.
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn avx512<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller promises the instructions that the token stands for.
        kernel.run(unsafe { Avx512::assume() })
    }

    /// # Safety
    /// The machine must have AVX-512 F, BW, DQ, VL, BF16 and VNNI.
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")]
    pub(super) unsafe fn avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the caller promises the instructions that the token stands for.
        kernel.run(unsafe { Avx512Bf16::assume() })
    }
}

#[cfg(test)]
mod tests {
    use super::{Level, LevelError};

    #[test]
    fn an_unset_or_empty_variable_means_the_detected_level() {
        assert_eq!(Level::from_environment(None), Ok(Level::detected()));
        assert_eq!(Level::from_environment(Some("  ")), Ok(Level::detected()));
    }

    #[test]
    fn every_available_level_can_be_forced_by_its_name() {
        for level in Level::available() {
            assert_eq!(Level::from_environment(Some(&level.name().to_uppercase())), Ok(level));
        }
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_accepted_ones() {
        let error = Level::from_environment(Some("avx9")).unwrap_err();
        assert_eq!(error, LevelError::Unknown("avx9".to_owned()));
        assert!(error.to_string().contains("portable, avx2, avx512, avx512bf16"));
    }

    #[test]
    fn a_level_above_the_detected_one_is_refused() {
        for level in Level::ALL.into_iter().filter(|&level| level > Level::detected()) {
            let error = Level::from_environment(Some(level.name())).unwrap_err();
            assert_eq!(error, LevelError::NotAvailable { asked: level, detected: Level::detected() });
        }
    }
}
