//! What the device can do: a copy for memory, cuBLASLt for GEMMs.

use crate::gpu::{Gpu, Value};
use crate::{Case, Fallible, Launch, common};
use half::bf16;
use pace_kernels::LinearShape;
use pace_kernels::cuda::cudarc::cublaslt::{self, CudaBlasLT, Matmul, MatmulConfig};
use std::rc::Rc;

pub const COPY: &str = "copy";
pub const PRODUCT: &str = "cuBLASLt product";

pub fn cases(gpu: &Gpu, layers: &[LinearShape]) -> Fallible<Vec<Case>> {
    let mut cases = vec![copy()];
    // SAFETY: loading the library runs its initialisers, which have no requirements.
    if unsafe { cublaslt::sys::is_culib_present() } {
        let blas = Rc::new(CudaBlasLT::new(gpu.stream.clone())?);
        cases.extend(layers.iter().map(|&layer| product(&blas, layer)));
    } else {
        println!("no cuBLASLt: the loader does not find libcublasLt (see LD_LIBRARY_PATH)");
    }
    Ok(cases)
}

/// 256 MiB from one buffer to another: each byte is read and written.
fn copy() -> Case {
    const LEN: usize = 1 << 26;
    Case {
        operator: COPY,
        family: "–",
        dtype: f32::NAME,
        shape: "256 MiB".into(),
        bytes: 2 * LEN * size_of::<f32>(),
        flop: 0,
        against_product: false,
        set: Box::new(|gpu| {
            let (from, mut to) = (gpu.values::<f32>(LEN)?, gpu.zeros::<f32>(LEN)?);
            let launch: Launch = Box::new(move |gpu: &Gpu| Ok(gpu.stream.memcpy_dtod(&from, &mut to)?));
            Ok(launch)
        }),
    }
}

/// `y = x·W0ᵀ` in bf16, without a bias.
fn product(blas: &Rc<CudaBlasLT>, shape: LinearShape) -> Case {
    let (m, k, n) = (shape.out_rows(), shape.in_features, shape.out_features);
    let blas = blas.clone();
    // Its matrices are column-major: what it computes is yᵀ [N, M] = W0 · xᵀ, where W0 is the transpose of a column-major
    // matrix [K, N].
    let config = MatmulConfig {
        transa: true,
        transb: false,
        transc: false,
        m: n as u64,
        n: m as u64,
        k: k as u64,
        alpha: 1.0,
        lda: k as i64,
        ldb: k as i64,
        beta: 0.0,
        ldc: n as i64,
        stride_a: None,
        stride_b: None,
        stride_c: None,
        stride_bias: None,
        batch_size: None,
    };
    Case {
        operator: PRODUCT,
        family: "–",
        dtype: bf16::NAME,
        shape: common::name(&shape),
        bytes: size_of::<bf16>() * (m * k + n * k + m * n),
        flop: 2 * m * k * n,
        against_product: false,
        set: Box::new(move |gpu| {
            let blas = blas.clone();
            let (x, weight) = (gpu.values::<bf16>(m * k)?, gpu.values::<bf16>(n * k)?);
            let mut y = gpu.zeros::<bf16>(m * n)?;
            let launch: Launch = Box::new(move |_: &Gpu| {
                // SAFETY: the sizes and strides are those of the three buffers.
                Ok(unsafe { blas.matmul(config, &weight, &x, &mut y, None, None) }?)
            });
            Ok(launch)
        }),
    }
}
