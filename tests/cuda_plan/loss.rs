//! The loss: geometry, wrong arguments, and its status.

use crate::support::*;
use pace_kernels::cuda::{Buffer, DType, Finding, Loss, LossStatus, Partner};
use pace_kernels::{Divergence, Error, LossSettings, Targets};

/// Classes, samples and remembered samples of `loss`.
const C: usize = 24;
const B: usize = 6;
const ROWS: usize = 10;
const SETTINGS: LossSettings = LossSettings { label_smoothing: 0.1, ..LossSettings::new(C, 0.5) };

/// Its tensors lie at multiples of 4096, in their order here.
fn loss() -> Loss {
    Loss {
        settings: SETTINGS,
        dtype: DType::F16,
        logits: buffer(4096, B * C),
        targets: Targets::Labels(buffer(2 * 4096, B)),
        class_weights: None,
        counted: None,
        partner: Partner::History { table: buffer(3 * 4096, ROWS * C), index: buffer(4 * 4096, B) },
        gradient: Some(buffer(5 * 4096, B * C)),
        values: buffer(6 * 4096, 3),
        status: buffer(7 * 4096, LossStatus::WORDS),
        accumulate: false,
        first_row: 0,
        workspace: buffer(8 * 4096, SETTINGS.workspace_len(B)),
    }
}

#[test]
fn a_loss_has_the_documented_geometry() {
    // A warp per sample of up to 256 classes; a block per sample while the batch is small.
    let plan = loss().plan().unwrap();
    let launch = only(&plan);
    assert_eq!((launch.kernel.name, launch.grid, launch.block), ("loss_f16", [1, 6, 1], [32, 1, 1]));
    // Two slices of 2056 and 2048 classes.
    let settings = LossSettings { classes: 4104, ..SETTINGS };
    let wide = Loss {
        settings,
        logits: buffer(1 << 20, B * 4104),
        partner: Partner::None,
        gradient: Some(buffer(1 << 21, B * 4104)),
        workspace: buffer(1 << 22, settings.workspace_len(B)),
        ..loss()
    };
    let plan = wide.plan().unwrap();
    let [first, launch] = launches(&plan);
    assert_eq!((first.kernel.name, first.grid, first.block), ("loss_scan_f16", [2, 6, 1], [512, 1, 1]));
    assert_eq!((launch.kernel.name, launch.grid, launch.block), ("loss_apply_f16", [2, 6, 1], [512, 1, 1]));
    // Only what combines the slices is left.
    let plan = Loss { gradient: None, ..wide }.plan().unwrap();
    assert_eq!(launches::<2>(&plan)[1].grid, [1, 6, 1]);
    // Whatever the sizes, blocks have at most 512 threads, and grids at most 65535 rows.
    for classes in [1, 33, 256, 257, 4096, 4097, 50257, 1 << 20, 1 << 30] {
        for batch in [1, 63, 64, 130, 1 << 12, 1 << 24] {
            let settings = LossSettings { classes, ..SETTINGS };
            let operator = Loss {
                settings,
                logits: buffer(1 << 60, 2 * batch * classes),
                targets: Targets::Labels(buffer(1 << 61, batch)),
                partner: Partner::OtherBranch,
                gradient: Some(buffer(1 << 62, 2 * batch * classes)),
                workspace: buffer(1 << 63, settings.workspace_len(batch)),
                ..loss()
            };
            let plan = operator.plan().unwrap();
            let count = if classes <= 4096 { 1 } else { 2 };
            assert_eq!((plan.steps().len(), plan.launches().count()), (count, count), "{classes} {batch}");
            for launch in plan.launches() {
                let ([x, y, _], [threads, ..]) = (launch.grid, launch.block);
                assert!(x > 0 && (1..=65535).contains(&y), "{classes} {batch}: {launch:?}");
                assert!((32..=512).contains(&threads) && threads % 32 == 0, "{classes} {batch}: {launch:?}");
            }
        }
    }
}

#[test]
fn wrong_arguments_of_a_loss_are_refused() {
    let wrong = |operator: Loss, want: Error| assert_error(operator.plan(), &want);
    let size = |argument, expected, got| Error::Size { argument, expected, got };
    let settings = |settings, want| wrong(Loss { settings, ..loss() }, want);
    settings(LossSettings { classes: 0, ..SETTINGS }, size("classes", "at least 1", 0));
    let classes = (1 << 30) + 1;
    settings(LossSettings { classes, ..SETTINGS }, size("classes", "at most 2^30", classes));
    for lambda in [-0.5, f64::INFINITY, f64::NEG_INFINITY, 1e39] {
        let got = if lambda == 1e39 { f64::INFINITY } else { lambda };
        let want = Error::Value { argument: "lambda", expected: "finite and not negative", got };
        settings(LossSettings { lambda, ..SETTINGS }, want);
    }
    for label_smoothing in [-0.1, 1.1, f64::INFINITY] {
        let want = Error::Value { argument: "label_smoothing", expected: "in [0, 1]", got: label_smoothing };
        settings(LossSettings { label_smoothing, ..SETTINGS }, want);
    }
    for operator in [
        LossSettings { lambda: f64::NAN, ..SETTINGS },
        LossSettings { label_smoothing: f64::NAN, ..SETTINGS },
    ] {
        assert!(matches!(Loss { settings: operator, ..loss() }.plan(), Err(Error::Value { .. })));
    }
    wrong(
        Loss { targets: Targets::Labels(buffer(8192, 0)), ..loss() },
        size("labels.len()", "at least 1", 0),
    );
    let batch = (1 << 24) + 1;
    wrong(
        Loss { targets: Targets::Labels(buffer(8192, batch)), ..loss() },
        size("labels.len()", "at most 2^24", batch),
    );

    // Each tensor in turn: what it is called, its shape and length, the bytes of an element, and the loss with another one.
    type With = fn(Buffer) -> Loss;
    let needed = SETTINGS.workspace_len(B);
    let tensors: [(&'static str, &'static str, usize, u64, With); 8] = [
        ("logits", "[B, C]", B * C, 2, |logits| Loss { logits, ..loss() }),
        ("labels", "[B]", B, 8, |labels| Loss { targets: Targets::Labels(labels), ..loss() }),
        ("history", "[n, C]", ROWS * C, 4, |table| {
            let index = buffer(4 * 4096, B);
            Loss { partner: Partner::History { table, index }, ..loss() }
        }),
        ("index", "[B]", B, 8, |index| {
            let table = buffer(3 * 4096, ROWS * C);
            Loss { partner: Partner::History { table, index }, ..loss() }
        }),
        ("gradient", "[B, C]", B * C, 2, |gradient| Loss { gradient: Some(gradient), ..loss() }),
        ("values", "[3]", 3, 4, |values| Loss { values, ..loss() }),
        ("status", "[9]", LossStatus::WORDS, 8, |status| Loss { status, ..loss() }),
        ("workspace", "[workspace_len()]", needed, 4, |workspace| Loss { workspace, ..loss() }),
    ];
    for (i, (name, shape, len, bytes, with)) in tensors.into_iter().enumerate() {
        let address = 4096 * (i as u64 + 1);
        assert_eq!(with(buffer(address, len)), loss(), "{name}");
        wrong(with(buffer(0, len)), argument(name, NULL));
        wrong(with(buffer(address + bytes / 2, len)), argument(name, MISALIGNED));
        match name {
            "history" => {
                let expected = "a multiple of the number of classes, and not 0";
                for got in [0, 1, len - 1, len + 1] {
                    wrong(with(buffer(address, got)), size("history.len()", expected, got));
                }
                let want = Error::Overflow { argument: "history", shape: "[n, C]" };
                wrong(with(buffer(address, usize::MAX - usize::MAX % C)), want);
            }
            // Another length is another batch.
            "labels" => wrong(with(buffer(address, B + 1)), length("logits", "[B, C]", (B + 1) * C, B * C)),
            // More is fine.
            "workspace" => {
                wrong(with(buffer(address, len - 1)), length(name, shape, len, len - 1));
                assert!(with(buffer(address, usize::MAX)).plan().is_ok());
            }
            _ => {
                for got in [0, len - 1, len + 1, usize::MAX] {
                    wrong(with(buffer(address, got)), length(name, shape, len, got));
                }
            }
        }
        // No output may touch anything else, by one element at either end; inputs may touch inputs.
        let input = |name| ["logits", "labels", "index"].contains(&name);
        for (j, &(other, _, other_len, other_bytes, _)) in tensors.iter().enumerate().filter(|&(j, _)| j != i)
        {
            // Addresses are multiples of 8 as well as of the element.
            let (start, end) =
                (4096 * (j as u64 + 1), 4096 * (j as u64 + 1) + other_bytes * other_len as u64);
            let behind = (end - 1) / 8 * 8;
            let before = (start - bytes * len as u64) / 8 * 8 + 8;
            for at in [behind, before] {
                let moved = with(buffer(at, len));
                match moved.plan() {
                    Ok(_) => assert!(input(name) && input(other), "{name} over {other}"),
                    Err(Error::Argument { argument, problem }) => {
                        let outputs = !input(name) && !input(other);
                        assert_eq!(
                            problem,
                            if outputs { "overlaps another output" } else { "overlaps an output" }
                        );
                        // With an input it is the one that is named.
                        assert!([name, other].contains(&argument) && (outputs || input(argument)));
                    }
                    Err(error) => panic!("{name} over {other}: {error}"),
                }
            }
        }
    }
    // The length saturates for sizes that no plan accepts.
    for classes in [0, usize::MAX] {
        let settings = LossSettings { classes, ..SETTINGS };
        assert_eq!(settings.workspace_len(usize::MAX), usize::MAX);
    }
    let both = Loss { partner: Partner::OtherBranch, ..loss() };
    wrong(both, length("logits", "[2B, C]", 2 * B * C, B * C));
    let both = Loss { logits: buffer(4096, 2 * B * C), ..both };
    wrong(both, length("gradient", "[2B, C]", 2 * B * C, B * C));
    let huge = LossSettings { classes: 1 << 30, ..SETTINGS };
    let huge = Loss {
        settings: huge,
        targets: Targets::Labels(buffer(8192, 1 << 24)),
        logits: buffer(4096, usize::MAX),
        ..both
    };
    assert!(matches!(huge.plan(), Err(Error::Length { argument: "logits", .. })));
}

/// Two branches with weighted classes, a divergence of probabilities, and what else only the general kernels have.
fn general(classes: usize) -> Loss {
    let settings = LossSettings { divergence: Divergence::SymmetricKl, ..LossSettings::new(classes, 0.5) };
    Loss {
        settings,
        dtype: DType::F16,
        logits: buffer(1 << 30, 2 * B * classes),
        targets: Targets::Labels(buffer(1 << 31, B)),
        class_weights: Some(buffer(1 << 32, classes)),
        partner: Partner::Difference,
        gradient: Some(buffer(1 << 33, 2 * B * classes)),
        workspace: buffer(1 << 34, settings.workspace_len(B)),
        ..loss()
    }
}

#[test]
fn the_papers_loss_has_kernels_of_its_own() {
    let names = |operator: Loss| -> Vec<&str> {
        operator.plan().unwrap().launches().map(|launch| launch.kernel.name).collect()
    };
    let two = |settings| Loss {
        settings,
        class_weights: None,
        partner: Partner::OtherBranch,
        workspace: buffer(1 << 34, settings.workspace_len(B)),
        ..general(C)
    };
    let paper = LossSettings::new(C, 0.5);
    // What differs from it by a factor has the same kernel.
    for settings in [
        paper,
        LossSettings { divergence: Divergence::MeanSquaredDifference, ..paper },
        LossSettings { labelled_only: true, ignore_label: Some(-100), ..paper },
        LossSettings { denominator: Some(3.0), label_smoothing: 0.1, ..paper },
    ] {
        assert_eq!(names(two(settings)), ["loss_f16"], "{settings:?}");
    }
    // Without a partner there is no divergence, and without a second branch one criterion.
    let both = LossSettings { both_branches: true, ..paper };
    let one = LossSettings { divergence: Divergence::JensenShannon, ..both };
    let logits = buffer(1 << 30, B * C);
    let gradient = Some(buffer(1 << 33, B * C));
    assert_eq!(names(Loss { partner: Partner::None, logits, gradient, ..two(one) }), ["loss_f16"]);
    let refused = argument("both_branches", "needs a second branch, and there is a history in its place");
    assert_error(Loss { settings: both, ..loss() }.plan(), &refused);

    let all = Targets::Probabilities(buffer(1 << 31, B * C));
    let values = Targets::Values(buffer(1 << 31, B * C));
    for operator in [
        two(both),
        two(LossSettings { divergence: Divergence::CenteredSquaredDifference, ..paper }),
        two(LossSettings { divergence: Divergence::JensenShannon, ..paper }),
        Loss { targets: all, ..two(paper) },
        Loss { targets: values, ..two(paper) },
        Loss { class_weights: Some(buffer(1 << 32, C)), ..two(paper) },
        Loss { partner: Partner::Difference, ..two(paper) },
    ] {
        assert_eq!(names(operator), ["loss_general_f16"], "{operator:?}");
    }
    // More than one slice: a launch for what comes first, one for sums that need it, one for the gradient, and what combines slices.
    let centred = Divergence::CenteredSquaredDifference;
    let wide = general(4104);
    let wide = Loss { settings: LossSettings { divergence: centred, ..wide.settings }, ..wide };
    let launches = [
        "loss_general_scan_f16",
        "loss_general_rows",
        "loss_general_sums_f16",
        "loss_general_divergence",
        "loss_general_apply_f16",
    ];
    assert_eq!(names(wide), launches);
    let grids = |operator: Loss| -> Vec<_> {
        operator.plan().unwrap().launches().map(|launch| (launch.grid, launch.block)).collect()
    };
    let (slices, rows) = (([2, 6, 1], [512, 1, 1]), ([1, 1, 1], [512, 1, 1]));
    assert_eq!(grids(wide), [slices, rows, slices, rows, slices]);
    assert_eq!(grids(Loss { gradient: None, ..wide })[4], ([1, 6, 1], [512, 1, 1]));
    // Others need no sums, or have a chain rule.
    let kl = Divergence::Kl { temperature: 2.0, detach_target: false };
    for divergence in [Divergence::SquaredDifference, Divergence::SymmetricKl, kl] {
        let settings = LossSettings { divergence, ..wide.settings };
        assert_eq!(
            names(Loss { settings, ..wide }),
            [launches[0], launches[1], launches[4]],
            "{divergence:?}"
        );
    }
    // More rows than a grid has blocks in its second dimension.
    let batch = 140_000;
    let settings = LossSettings { classes: 4104, ..wide.settings };
    let many = Loss {
        logits: buffer(1 << 40, 2 * batch * 4104),
        targets: Targets::Labels(buffer(1 << 50, batch)),
        gradient: Some(buffer(1 << 42, 2 * batch * 4104)),
        workspace: buffer(1 << 44, settings.workspace_len(batch)),
        ..wide
    };
    let geometry: Vec<_> = grids(many).into_iter().map(|(grid, _)| grid).collect();
    assert_eq!(geometry, [[2, 46667, 3], [1, 1024, 1], [2, 46667, 3], [1, 1024, 1], [2, 46667, 3]]);
}

#[test]
fn wrong_arguments_of_other_losses_are_refused() {
    let wrong = |operator: Loss, want: Error| assert_error(operator.plan(), &want);
    let value = |argument, expected, got| Error::Value { argument, expected, got };
    let settings = general(C).settings;
    let with = |settings| Loss { settings, ..general(C) };
    for temperature in [1e-19, 1e19] {
        let divergence = Divergence::Kl { temperature, detach_target: false };
        wrong(
            with(LossSettings { divergence, ..settings }),
            value("temperature", "in [1e-6, 1e6]", temperature),
        );
    }
    for denominator in [1e-39, 1e39] {
        wrong(
            with(LossSettings { denominator: Some(denominator), ..settings }),
            value("denominator", "in the range of f32", denominator),
        );
    }
    let strong = LossSettings { lambda: 1e20, denominator: Some(1e-20), ..settings };
    wrong(with(strong), value("lambda", "finite and not negative", f64::INFINITY));

    // Each tensor in turn: another length, no address, and over an output.
    type With = fn(Buffer) -> Loss;
    let tensors: [(&'static str, &'static str, usize, With); 4] = [
        ("class_weights", "[C]", C, |all| Loss { class_weights: Some(all), ..general(C) }),
        ("counted", "[n]", 2 * B, |all| Loss { counted: Some(all), ..general(C) }),
        ("probabilities", "[B, C]", B * C, |all| Loss { targets: Targets::Probabilities(all), ..general(C) }),
        ("values", "[B, C]", B * C, |all| Loss {
            settings: LossSettings::new(C, 0.5),
            class_weights: None,
            targets: Targets::Values(all),
            ..general(C)
        }),
    ];
    for (name, shape, len, with) in tensors {
        assert!(with(buffer(1 << 36, len)).plan().is_ok(), "{name}");
        wrong(with(buffer(0, len)), argument(name, NULL));
        wrong(with(buffer((1 << 36) + 2, len)), argument(name, MISALIGNED));
        wrong(with(buffer(1 << 33, len)), argument(name, "overlaps an output"));
        match name {
            "class_weights" => wrong(with(buffer(1 << 36, len - 1)), length(name, shape, len, len - 1)),
            "counted" => {
                wrong(
                    with(buffer(1 << 36, 0)),
                    Error::Size { argument: "counted.len()", expected: "at least 1", got: 0 },
                );
                let got = (1 << 24) + 1;
                wrong(
                    with(buffer(1 << 36, got)),
                    Error::Size { argument: "counted.len()", expected: "at most 2^24", got },
                );
            }
            _ => {
                let expected = "a multiple of the number of classes, and not 0";
                for got in [0, len - 1] {
                    let result = with(buffer(1 << 36, got)).plan();
                    assert!(
                        matches!(result, Err(Error::Size { expected: e, got: g, .. }) if e == expected && g == got)
                    );
                }
                // Another length is another batch.
                wrong(
                    with(buffer(1 << 36, len + C)),
                    length("logits", "[2B, C]", 2 * (B + 1) * C, 2 * B * C),
                );
            }
        }
    }
    let counted = Some(buffer(1 << 36, 2 * B));
    let given = LossSettings { denominator: Some(4.0), ..settings };
    let problem = "is not counted, as there is a denominator";
    wrong(Loss { counted, ..with(given) }, argument("counted", problem));
    let targets = Targets::Probabilities(buffer(1 << 35, B * C));
    let problem = "are labels, and the targets are not";
    wrong(Loss { counted, targets, ..general(C) }, argument("counted", problem));
    let adds = Loss { accumulate: true, ..general(C) };
    wrong(adds, argument("accumulate", "needs a denominator, given or counted"));
    assert!(Loss { counted, ..adds }.plan().is_ok());
    assert!(Loss { settings: given, ..adds }.plan().is_ok());
}

#[test]
fn a_status_becomes_the_error_of_the_first_wrong_element() {
    let words = [2, 5, (-7i64).cast_unsigned(), 1, 3, 99, 4, 1, 8];
    let status = LossStatus::new(words);
    let finding = |count, position, value| Finding { count, position, value };
    let [labels, indices, repeated] = [finding(2, 5, -7), finding(1, 3, 99), finding(4, 1, 8)];
    assert_eq!(status, LossStatus { labels, indices, repeated });
    let none = Finding::default();
    let check = |status: LossStatus| status.check(C, ROWS);
    assert_eq!(check(LossStatus::default()), Ok(()));
    assert_eq!(check(status), Err(Error::Label { position: 5, label: -7, classes: C }));
    let duplicate = Err(Error::DuplicateIndex { position: 1, index: 8 });
    assert_eq!(check(LossStatus { labels: none, ..status }), duplicate);
    assert_eq!(check(LossStatus { labels: none, indices: none, repeated }), duplicate);
    let index = Err(Error::Index { position: 3, index: 99, rows: ROWS });
    let later = finding(1, 4, 8);
    assert_eq!(check(LossStatus { labels: none, indices, repeated: later }), index);
    assert_eq!(check(LossStatus { labels: none, indices, repeated: none }), index);
}
