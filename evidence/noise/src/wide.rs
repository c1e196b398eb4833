//! Loops compiled for the widest vectors that the processor has, as the library's own are.

use crate::generator::Generator;

/// A loop that gains from wide vectors; `run` is to be `#[inline(always)]`.
pub trait Loop {
    fn run(self);
}

#[inline(always)]
pub fn widest(body: impl Loop) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512cd,avx512dq,avx512bw,avx512vl,avx2,fma,lzcnt,popcnt")]
        fn avx512(body: impl Loop) {
            body.run();
        }
        #[target_feature(enable = "avx2,fma,lzcnt,popcnt")]
        fn avx2(body: impl Loop) {
            body.run();
        }
        macro_rules! have {
            ($($feature:tt)*) => { $(is_x86_feature_detected!($feature))&&* };
        }
        if have!("avx512f" "avx512cd" "avx512dq" "avx512bw" "avx512vl" "avx2" "fma" "lzcnt" "popcnt") {
            // SAFETY: the processor has every feature that `avx512` enables.
            return unsafe { avx512(body) };
        }
        if have!("avx2" "fma" "lzcnt" "popcnt") {
            // SAFETY: the processor has every feature that `avx2` enables.
            return unsafe { avx2(body) };
        }
    }
    body.run();
}

/// With the widest vectors if `G`'s streams are long, or else with those that every processor has.
pub fn run<G: Generator>(body: impl Loop) {
    if G::IS_LONG {
        widest(body);
    } else {
        body.run();
    }
}
