//! Loops compiled for the widest vectors that the processor has.
//!
//! The compiler vectorises these loops by itself; it only has to be told that it may use wide registers. Every element
//! is computed by the same IEEE 754 operations in any of them (nothing is contracted or reordered), so the bits do
//! not depend on the processor.

/// A loop that gains from wide vectors.
///
/// A trait, because `run` must be compiled again inside each variant of [`widest`]: implementations mark it
/// `#[inline(always)]`, which a closure cannot be.
pub(crate) trait Loop {
    /// Runs it.
    fn run(self);
}

/// Runs a loop with the widest vectors.
#[inline(always)]
pub(crate) fn widest(body: impl Loop) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512cd,avx512dq,avx512bw,avx512vl,avx2,fma")]
        fn avx512(body: impl Loop) {
            body.run();
        }
        #[target_feature(enable = "avx2,fma,lzcnt")]
        fn avx2(body: impl Loop) {
            body.run();
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512cd")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma")
        {
            // SAFETY: the processor has every feature that `avx512` enables (AVX-512 includes AVX2).
            return unsafe { avx512(body) };
        }
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("lzcnt")
        {
            // SAFETY: the processor has every feature that `avx2` enables.
            return unsafe { avx2(body) };
        }
    }
    body.run();
}

/// `op(&mut out[i], a[i])` for every element.
pub(crate) fn zip1<O, A: Copy>(out: &mut [O], a: &[A], op: impl Fn(&mut O, A)) {
    struct Zip<'a, O, A, F>(&'a mut [O], &'a [A], F);
    impl<O, A: Copy, F: Fn(&mut O, A)> Loop for Zip<'_, O, A, F> {
        #[inline(always)]
        fn run(self) {
            for (out, &a) in self.0.iter_mut().zip(self.1) {
                self.2(out, a);
            }
        }
    }
    widest(Zip(out, a, op));
}

/// `op(&mut out[i], a[i], b[i])` for every element.
pub(crate) fn zip2<O, A: Copy, B: Copy>(out: &mut [O], a: &[A], b: &[B], op: impl Fn(&mut O, A, B)) {
    struct Zip<'a, O, A, B, F>(&'a mut [O], &'a [A], &'a [B], F);
    impl<O, A: Copy, B: Copy, F: Fn(&mut O, A, B)> Loop for Zip<'_, O, A, B, F> {
        #[inline(always)]
        fn run(self) {
            for ((out, &a), &b) in self.0.iter_mut().zip(self.1).zip(self.2) {
                self.3(out, a, b);
            }
        }
    }
    widest(Zip(out, a, b, op));
}

/// `op(&mut out[i], a[i], b[i], c[i], d[i])` for every element; all but `out` are of one type.
pub(crate) fn zip4<O, A: Copy>(out: &mut [O], [a, b, c, d]: [&[A]; 4], op: impl Fn(&mut O, A, A, A, A)) {
    struct Zip<'a, O, A, F>(&'a mut [O], [&'a [A]; 4], F);
    impl<O, A: Copy, F: Fn(&mut O, A, A, A, A)> Loop for Zip<'_, O, A, F> {
        #[inline(always)]
        fn run(self) {
            let [a, b, c, d] = self.1;
            for ((((out, &a), &b), &c), &d) in self.0.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                self.2(out, a, b, c, d);
            }
        }
    }
    widest(Zip(out, [a, b, c, d], op));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every variant that this processor has gives the bits of the plain loop, at lengths around the vectors'.
    #[test]
    fn wide_loops_give_the_bits_of_plain_ones() {
        for n in [0, 1, 3, 4, 7, 8, 15, 16, 17, 33] {
            let value = |i: usize, seed: usize| ((i * 37 + seed * 11) % 101) as f32 * 0.37 - 17.3;
            let column = |seed: usize| -> Vec<f32> { (0..n).map(|i| value(i, seed)).collect() };
            let (a, b, c) = (column(1), column(2), column(3));
            let mut got = [column(0), column(0), column(0)];
            zip1(&mut got[0], &a, |out, a| *out = *out * a + 0.1);
            zip2(&mut got[1], &a, &b, |out, a, b| *out = *out * a + b);
            zip4(&mut got[2], [&a, &b, &c, &a], |out, a, b, c, d| *out = a * b + c * *out + d);
            for (i, start) in column(0).into_iter().enumerate() {
                let expected = [start * a[i] + 0.1, start * a[i] + b[i], a[i] * b[i] + c[i] * start + a[i]];
                for (got, expected) in got.iter().zip(expected) {
                    assert_eq!(got[i].to_bits(), expected.to_bits());
                }
            }
        }
    }
}
