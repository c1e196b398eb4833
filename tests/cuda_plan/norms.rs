//! Gradient norm and FP-distance: geometry, and wrong arguments.

use crate::support::*;
use pace_kernels::Error;
use pace_kernels::cuda::{Buffer, DType, FpDistance, GradNorm};

#[test]
fn norm_plans() {
    let gradients = [buffer(1 << 16, 4097), buffer(0, 0), buffer(1 << 20, 5)];
    let norm = buffer(1 << 8, 1);
    let workspace = buffer(1 << 10, 3);
    let operator = GradNorm { dtype: DType::F16, gradients: &gradients, norm, workspace };
    assert_eq!(GradNorm::workspace_len([4097, 0, 5]), 3);
    let plan = operator.plan().unwrap();
    let [sums, total] = launches(&plan);
    assert_eq!((sums.kernel.name, sums.grid), ("grad_norm_f16", [3, 1, 1]));
    assert_eq!((total.kernel.name, total.grid), ("norm_total", [1, 1, 1]));
    let plan = GradNorm { gradients: &[], workspace: buffer(0, 0), ..operator }.plan().unwrap();
    assert_eq!(only(&plan).kernel.name, "norm_total");
    let refused = |operator: GradNorm<'_>, want| assert_error(operator.plan(), &want);
    let with = |gradients: &[Buffer], want| refused(GradNorm { gradients, ..operator }, want);
    with(&[gradients[0], buffer(0, 3)], argument("gradients", NULL));
    with(&[buffer(1, 3)], argument("gradients", MISALIGNED));
    with(&[buffer(u64::MAX - 1, 3)], argument("gradients", ENDLESS));
    with(&[buffer(2, usize::MAX)], Error::Overflow { argument: "gradients", shape: "any" });
    let endless = Error::Overflow { argument: "workspace", shape: "[workspace_len()]" };
    with(&[buffer(2, 1 << 45)], endless.clone());
    with(&[buffer((1 << 10) + 4, 2)], argument("gradients", "overlaps an output"));
    refused(GradNorm { norm: buffer(1 << 8, 2), ..operator }, length("norm", "[1]", 1, 2));
    refused(GradNorm { norm: buffer(260, 1), ..operator }, argument("norm", MISALIGNED));
    refused(
        GradNorm { norm: buffer((1 << 10) + 16, 1), ..operator },
        argument("workspace", "overlaps another output"),
    );
    let shape = "[workspace_len()]";
    refused(GradNorm { workspace: buffer(1 << 10, 2), ..operator }, length("workspace", shape, 3, 2));
    refused(GradNorm { workspace: buffer((1 << 10) + 4, 3), ..operator }, argument("workspace", MISALIGNED));

    let operator = FpDistance {
        samples: 10,
        features: 2000,
        dtype: DType::F32,
        fine_tuned: buffer(1 << 20, 20_000),
        pre_trained: buffer(1 << 21, 20_000),
        distance: norm,
        workspace: buffer(1 << 10, 5),
    };
    assert_eq!(FpDistance::workspace_len(10, 2000), 5);
    let plan = operator.plan().unwrap();
    let [sums, total] = launches(&plan);
    assert_eq!(total.kernel.name, "norm_total");
    assert_eq!((sums.kernel.name, sums.grid), ("fp_distance_f32", [5, 1, 1]));
    let shape = "[samples, features]";
    let zero = |argument| Error::Size { argument, expected: "at least 1", got: 0 };
    for (operator, want) in [
        (FpDistance { samples: 0, ..operator }, zero("samples")),
        (FpDistance { features: 0, ..operator }, zero("features")),
        (FpDistance { features: usize::MAX, ..operator }, Error::Overflow { argument: "fine_tuned", shape }),
        (FpDistance { fine_tuned: norm, ..operator }, length("fine_tuned", shape, 20_000, 1)),
        (FpDistance { pre_trained: buffer(2, 20_000), ..operator }, argument("pre_trained", MISALIGNED)),
        (
            FpDistance { distance: buffer((1 << 21) + 8, 1), ..operator },
            argument("pre_trained", "overlaps an output"),
        ),
        (FpDistance { distance: buffer(0, 1), ..operator }, argument("distance", NULL)),
        (
            FpDistance { workspace: buffer(1 << 10, 1), ..operator },
            length("workspace", "[workspace_len()]", 5, 1),
        ),
    ] {
        assert_error(operator.plan(), &want);
    }
    let (samples, features) = (1 << 23, 1 << 22);
    let [fine_tuned, pre_trained] = [1 << 50, 1 << 51].map(|address| buffer(address, 1 << 45));
    assert_error(FpDistance { samples, features, fine_tuned, pre_trained, ..operator }.plan(), &endless);
}
