//! What a host program registers: threads, by a small runtime of this file, and GEMMs, by a plain BLAS, written here after the
//! definition, that must be given what it asks for.

use pace_kernels::LinearShape;
use pace_kernels::cpu::{
    Base, Blas, LowRankGrads, LowRankLinear, NoisyLinear, NoisyLinearGrads, set_blas, set_openmp,
};
use pace_kernels::noise::{Generator, Key, Noise, NoiseShape};
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

static CALLS: AtomicUsize = AtomicUsize::new(0);
static LOOPS: AtomicUsize = AtomicUsize::new(0);

/// `GOMP_parallel`.
unsafe extern "C" fn parallel(
    work: unsafe extern "C" fn(*mut c_void),
    data: *mut c_void,
    threads: c_uint,
    flags: c_uint,
) {
    struct Data(*mut c_void);
    // SAFETY: the library's data are for all threads of the loop.
    unsafe impl Sync for Data {}
    assert_eq!((threads, flags), (3, 0));
    LOOPS.fetch_add(1, Ordering::Relaxed);
    let data = &Data(data);
    // SAFETY: `work` is called with its data, which last as long as this function runs.
    let work = move || unsafe { work(data.0) };
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
        work();
    });
}

macro_rules! gemm {
    ($name:ident, $type:ty) => {
        /// `C = alpha·op(A)·op(B) + beta·C` in columns.
        #[allow(clippy::too_many_arguments)] // BLAS has them
        unsafe extern "C" fn $name(
            transa: *const c_char,
            transb: *const c_char,
            m: *const c_int,
            n: *const c_int,
            k: *const c_int,
            alpha: *const $type,
            a: *const $type,
            lda: *const c_int,
            b: *const $type,
            ldb: *const c_int,
            beta: *const $type,
            c: *mut $type,
            ldc: *const c_int,
        ) {
            CALLS.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the library passes pointers to numbers, and matrices of these sizes.
            unsafe {
                let (transa, transb) = (*transa as u8 == b'T', *transb as u8 == b'T');
                let [m, n, k, lda, ldb, ldc] = [m, n, k, lda, ldb, ldc].map(|size| *size as usize);
                assert!(lda >= if transa { k } else { m } && ldb >= if transb { n } else { k } && ldc >= m);
                for j in 0..n {
                    for i in 0..m {
                        let term = |l: usize| {
                            let a = *a.add(if transa { i * lda + l } else { l * lda + i });
                            a * *b.add(if transb { l * ldb + j } else { j * ldb + l })
                        };
                        let sum: $type = (0..k).map(term).sum();
                        let at = c.add(j * ldc + i);
                        // BLAS does not read C where beta is zero.
                        *at = *alpha * sum + if *beta == 0.0 { 0.0 } else { *beta * *at };
                    }
                }
            }
        }
    };
}

gemm!(sgemm, f32);
gemm!(dgemm, f64);

fn values(seed: usize, len: usize) -> Vec<f64> {
    (0..len).map(|i| ((i * 37 + seed * 101) % 211) as f64 / 105.0 - 1.0).collect()
}

/// Outputs and gradients of both layers, over sizes that are large enough for a BLAS.
fn run(noise: Noise<&'_ [f64]>, shape: LinearShape) -> Vec<Vec<f64>> {
    let (m, k, n, r) = (shape.out_rows(), shape.in_features, shape.out_features, 40);
    let [weight, bias, delta, x, dy] =
        [n * k, n, n * k, shape.in_rows() * k, m * n].map(|len| values(len, len));
    let base = Some(Base { weight: &weight[..], bias: Some(&bias[..]) });
    let layer =
        NoisyLinear { shape, noise, base, delta_weight: Some(&delta), delta_bias: Some(&bias), fold: true };
    let (mut y, mut dx, mut dw, mut db) = (vec![0.0; m * n], x.clone(), delta.clone(), bias.clone());
    layer.forward(&x, &mut y).unwrap();
    let grads: NoisyLinearGrads<&mut [_]> =
        NoisyLinearGrads { input: Some(&mut dx), delta_weight: Some(&mut dw), delta_bias: Some(&mut db) };
    layer.backward(&x, &dy, grads).unwrap();

    let (lora_b, lora_a) = (values(1, n * r), values(2, r * k));
    let lora = LowRankLinear {
        shape,
        noise,
        base,
        rank: r,
        lora_b: &lora_b,
        lora_a: &lora_a,
        delta_bias: None,
        scale: 0.5,
    };
    let (mut y2, mut dx2, mut dd, mut du) = (y.clone(), x.clone(), lora_b.clone(), lora_a.clone());
    lora.forward(&x, &mut y2).unwrap();
    let grads: LowRankGrads<&mut [_]> = LowRankGrads {
        input: Some(&mut dx2),
        lora_b: Some(&mut dd),
        lora_a: Some(&mut du),
        delta_bias: None,
    };
    lora.backward(&x, &dy, grads).unwrap();
    vec![y, dx, dw, db, y2, dx2, dd, du]
}

#[test]
fn what_a_host_registers_gives_what_the_crate_gives() {
    // Threads say how many of them compute, wherever they are.
    rayon::ThreadPoolBuilder::new().num_threads(3).build_global().unwrap();
    let noise = |shape| Noise::Generated(Generator::new(Key::derive(1, 2, 3), 0.7, shape, 5).unwrap());
    let shape = |batch, tokens, shared_input| LinearShape {
        branches: 2,
        batch,
        tokens,
        in_features: 96,
        out_features: 1056,
        shared_input,
    };
    let cases = [
        // Folded, both GEMMs, no noise; a shared input; one sample, whose GEMM all threads share.
        (noise(NoiseShape::PerSample), shape(2, 40, false)),
        (noise(NoiseShape::PerToken), shape(2, 40, false)),
        (Noise::Off, shape(2, 40, false)),
        (noise(NoiseShape::PerSample), shape(2, 40, true)),
        (noise(NoiseShape::PerSample), shape(1, 150, false)),
    ];
    let before: Vec<_> = cases.map(|(noise, shape)| run(noise, shape)).into();
    // SAFETY: this is such a function.
    unsafe {
        set_openmp(parallel).unwrap();
        assert!(set_openmp(parallel).is_err(), "twice");
    }
    assert_eq!(LOOPS.load(Ordering::Relaxed), 0);
    for ((noise, shape), before) in cases.into_iter().zip(&before) {
        let loops = LOOPS.load(Ordering::Relaxed);
        assert_eq!(&run(noise, shape), before, "{shape:?}");
        assert!(LOOPS.load(Ordering::Relaxed) > loops, "{shape:?} did not run there");
    }

    // Operators on all threads of the pool at once, with fewer rows than are shared out, wait for none of these.
    let (noise, shape) = (noise(NoiseShape::PerToken), shape(1, 10, false));
    let want = run(noise, shape);
    rayon::scope(|scope| {
        (0..3).for_each(|_| scope.spawn(|_| assert_eq!(run(noise, shape), want)));
    });

    assert_eq!(CALLS.load(Ordering::Relaxed), 0);
    let blas = Blas { sgemm, dgemm, set_num_threads_local: None };
    // SAFETY: these are such functions.
    unsafe {
        set_blas(blas).unwrap();
        assert!(set_blas(blas).is_err(), "twice");
    }
    for ((noise, shape), before) in cases.into_iter().zip(before) {
        let calls = CALLS.load(Ordering::Relaxed);
        let after = run(noise, shape);
        assert!(CALLS.load(Ordering::Relaxed) > calls, "{shape:?} did not use it");
        for (i, (before, after)) in before.iter().zip(after).enumerate() {
            let largest = before.iter().fold(0f64, |largest, value| largest.max(value.abs()));
            let error = before.iter().zip(&after).fold(0f64, |error, (a, b)| error.max((a - b).abs()));
            assert!(error <= 1e-12 * largest, "result {i} of {shape:?}: {error:e} of {largest:e}");
        }
    }
}
