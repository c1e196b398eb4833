//! The short form: every test on every walk, on less data, and that the tests reject generators with a fault.
//!
//! Streams are fixed: nothing here can fail by chance. `cargo test -p pace-noise-evidence -- --nocapture` shows the
//! probabilities.

use pace_kernels::noise::{Generator as Noise, Key, NoiseShape, normals as transform, philox4x32_10};
use pace_noise_evidence::finding::{Finding, uniformity};
use pace_noise_evidence::generator::{Address, Generator, Library};
use pace_noise_evidence::normals;
use pace_noise_evidence::stream::{Axis, Stream};
use pace_noise_evidence::words::{self, Form};
use std::f64::consts::{PI, SQRT_2};

/// Bytes of words of each walk, draws of normals, and bytes that show a fault.
const LOG2_BYTES: u32 = 24;
const LOG2_DRAWS: u32 = 21;
const LOG2_FAULTY: u32 = 23;

fn check(what: Axis, findings: &[Finding]) {
    for finding in findings {
        assert!(!finding.fails(), "{what:?}: {finding:?}");
    }
    let least = findings.iter().min_by(|a, b| a.p().total_cmp(&b.p())).unwrap();
    println!("{what:?}: {} findings, least p {:.1e} ({})", findings.len(), least.p(), least.test);
}

#[test]
fn words_pass_along_every_axis() {
    let mut all = Vec::new();
    for &axis in Axis::ALL {
        let findings = words::run::<Library>(axis, LOG2_BYTES, Form::Short);
        check(axis, &findings);
        all.extend(findings);
    }
    let uniform = uniformity(&all);
    println!("{uniform:?}");
    assert!(!uniform.fails(), "{uniform:?}");
}

#[test]
fn normals_pass_along_every_axis() {
    let mut all = Vec::new();
    for axis in normals::AXES {
        let findings = normals::run::<Library>(axis, LOG2_DRAWS, 1);
        check(axis, &findings);
        all.extend(findings);
    }
    let uniform = uniformity(&all);
    println!("{uniform:?}");
    assert!(!uniform.fails(), "{uniform:?}");
}

/// The streams are of the library's noise: addresses with any bits set give what its public functions give.
#[test]
fn addresses_are_the_librarys() {
    const SCALE: f32 = (1u128 << 64) as f32;
    for i in 0..1000u32 {
        let random = philox4x32_10([i, 0, 0, 0], [1, 2]);
        let more = philox4x32_10([i, 1, 0, 0], [1, 2]);
        let wide = |word: u32, other: u32| u64::from(word) << 32 | u64::from(other);
        let a = Address {
            seed: wide(random[0], more[0]),
            step: wide(random[1], more[1]),
            layer: random[2],
            branch: more[2] & 255,
            sample: wide(random[3], more[3]) >> 8,
            token: if i % 2 == 0 { u32::MAX } else { random[0] >> 1 },
            group: random[1] >> 2,
        };
        let shape = if i % 2 == 0 { NoiseShape::PerSample } else { NoiseShape::PerToken };
        let key = Key::derive(a.seed, a.step, a.layer);
        assert_eq!(Library::key(a.seed, a.step, a.layer), key.0);
        // Under a σ of 2⁶⁴ the 1 of z = 1 + σ·n vanishes.
        let mut z = [0f32; 4];
        Noise::new(key, SCALE, shape, a.sample).unwrap().fill(
            a.branch as u8,
            0,
            a.token,
            4 * a.group,
            &mut z,
        );
        assert_eq!(z.map(|z| z / SCALE), transform(Library::at(a)), "{a:?}");
    }
}

/// No address comes twice in a walk, nor in the two streams of a pair: the first counters of every walk differ.
#[test]
fn walks_do_not_repeat() {
    for &axis in Axis::ALL {
        let mut words = vec![0; 1 << 18];
        Stream::<Library>::new(axis).read(&mut words);
        let mut seen: Vec<_> = words.as_chunks::<4>().0.to_vec();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), words.len() / 4, "{axis:?}");
    }
}

/// Fewer rounds.
struct Rounds<const N: usize>;

impl<const N: usize> Generator for Rounds<N> {
    #[inline(always)]
    fn words([mut c0, mut c1, mut c2, mut c3]: [u32; 4], [mut k0, mut k1]: [u32; 2]) -> [u32; 4] {
        for _ in 0..N {
            let (p0, p1) = (u64::from(c0) * 0xD251_1F53, u64::from(c2) * 0xCD9E_8D57);
            (c0, c1, c2, c3) =
                ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
            (k0, k1) = (k0.wrapping_add(0x9E37_79B9), k1.wrapping_add(0xBB67_AE85));
        }
        [c0, c1, c2, c3]
    }
}

#[test]
fn rounds_are_philox() {
    assert_eq!(Rounds::<10>::words([1, 2, 3, 4], [5, 6]), philox4x32_10([1, 2, 3, 4], [5, 6]));
}

macro_rules! faulty {
    ($($(#[$what:meta])* $name:ident: $function:item)*) => {
        $($(#[$what])* struct $name; impl Generator for $name { #[inline(always)] $function })*
    };
}

faulty! {
    /// No generator at all.
    Counter: fn words(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
        [counter[0] ^ key[0], counter[1] ^ key[1], counter[2], counter[3]]
    }
    /// The key is the seed and the step: nothing mixes the layer and the upper halves in.
    UnmixedKey: fn key(seed: u64, step: u64, _: u32) -> [u32; 2] {
        [seed as u32, step as u32]
    }
    /// Samples beyond 2³² come again.
    ShortSample: fn counter(a: Address) -> [u32; 4] {
        [a.group, a.token, a.sample as u32, a.branch << 24]
    }
    /// Both branches draw the same.
    OneBranch: fn counter(a: Address) -> [u32; 4] {
        Library::counter(Address { branch: 0, ..a })
    }
    /// One bit is stuck in one call of 16.
    StuckBit: fn words(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
        let mut words = philox4x32_10(counter, key);
        words[2] |= u32::from(words[1] >> 28 == 0) << 7;
        words
    }
    /// ln 2 is 0.69.
    WrongLogarithm: fn normals(words: [u32; 4]) -> [f32; 4] {
        box_muller(words, 0.69, 2.0 * PI)
    }
    /// The circle is short of a full turn by a hundredth.
    WrongAngle: fn normals(words: [u32; 4]) -> [f32; 4] {
        box_muller(words, std::f64::consts::LN_2, 1.98 * PI)
    }
    /// One word makes radius and angle.
    OneWord: fn normals([a, _, b, _]: [u32; 4]) -> [f32; 4] {
        transform([a, a, b, b])
    }
}

/// The transform in double precision, with constants to choose.
fn box_muller(words: [u32; 4], ln_2: f64, turn: f64) -> [f32; 4] {
    let pair = |radius: u32, angle: u32| {
        let u = (f64::from(radius) + 1.0) / 4294967296.0;
        let r = (-u.log2() * ln_2).sqrt() * SQRT_2;
        let (sin, cos) = (f64::from(angle) / 4294967296.0 * turn).sin_cos();
        [(r * cos) as f32, (r * sin) as f32]
    };
    let ([a, b], [c, d]) = (pair(words[0], words[1]), pair(words[2], words[3]));
    [a, b, c, d]
}

/// The findings that reject a generator.
fn rejected(what: &str, findings: &[Finding]) {
    let failed: Vec<_> =
        findings.iter().filter(|finding| finding.fails()).map(|finding| &finding.test[..]).collect();
    println!("{what}: rejected by {} of {}: {failed:?}", failed.len(), findings.len());
    assert!(!failed.is_empty(), "{what} passes");
}

#[test]
fn faults_of_the_words_are_rejected() {
    let run = |what: &str, findings: Vec<Finding>| rejected(what, &findings);
    run("a counter", words::run::<Counter>(Axis::Channel, LOG2_FAULTY, Form::Short));
    run("2 rounds", words::run::<Rounds<2>>(Axis::Channel, LOG2_FAULTY, Form::Short));
    run("3 rounds", words::run::<Rounds<3>>(Axis::Channel, LOG2_FAULTY, Form::Short));
    run("4 rounds", words::run::<Rounds<4>>(Axis::Channel, LOG2_FAULTY, Form::Short));
    run("an unmixed key", words::run::<UnmixedKey>(Axis::Layer, LOG2_FAULTY, Form::Short));
    run("an unmixed key", words::run::<UnmixedKey>(Axis::StepHigh, LOG2_FAULTY, Form::Short));
    run("short samples", words::run::<ShortSample>(Axis::SampleHigh, LOG2_FAULTY, Form::Short));
    run("one branch", words::run::<OneBranch>(Axis::PairBranch, LOG2_FAULTY, Form::Short));
    run("a stuck bit", words::run::<StuckBit>(Axis::Channel, LOG2_FAULTY, Form::Short));
}

#[test]
fn faults_of_the_normals_are_rejected() {
    // Half a per cent of the variance: 4.6 standard errors of 2^21 draws.
    rejected("ln 2 = 0.69", &normals::run::<WrongLogarithm>(Axis::Channel, 24, 16));
    rejected("a short circle", &normals::run::<WrongAngle>(Axis::Channel, LOG2_DRAWS, 1));
    rejected("one word for two", &normals::run::<OneWord>(Axis::Channel, LOG2_DRAWS, 1));
}
