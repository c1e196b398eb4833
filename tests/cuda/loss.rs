//! The loss: values, gradient, history and status, against the CPU operator in f64.

use crate::device;
use crate::loss_data::*;
use crate::machine::Target;
use crate::support::{Type, assert_close, distance, wide};
use half::{bf16, f16};
use pace_kernels::Targets;
use pace_kernels::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use pace_kernels::cuda::{Consistency, Finding, LossInputs, LossOutputs, LossStatus, Partner};

fn evaluate<T: Type>(case: Case, target: &Target<'_>) {
    let data = Data::<T>::new(case);
    let want = data.on_cpu().unwrap();
    let first = std::cell::OnceCell::new();
    target.run(case.shift, |machine| {
        let operator = data.operator(machine);
        machine.launch(&operator.plan().unwrap());
        assert_eq!(data.check(machine, &operator, &want), LossStatus::default(), "{case:?}");
        // The same bits in whatever order threads and blocks run.
        let gradient = operator.gradient.map(|gradient| machine.read::<T>(gradient));
        let results = (machine.read::<u32>(operator.values), gradient);
        assert!(first.get_or_init(|| results.clone()) == &results, "{case:?} depends on the order");
    });
}

/// In all types; a case costs the same work in each.
fn every_type(case: Case, target: &Target<'_>) {
    evaluate::<f32>(case, target);
    evaluate::<f16>(case, target);
    evaluate::<bf16>(case, target);
}

/// Classes around vectors of 4 and 8, warps, the 256 elements of a warp, and groups of several warps.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let sizes = [1, 2, 7, 8, 31, 32, 33, 100, 128, 129, 256, 257, 1000];
    for (i, classes) in sizes.into_iter().enumerate() {
        for (j, variant) in VARIANTS.into_iter().enumerate() {
            for (k, smoothing) in [0.0, 0.1, 1.0].into_iter().enumerate() {
                let (batch, shift) = ([3, 2, 1][k], (i / 2 + j) % 2);
                let case = Case { classes, variant, smoothing, batch, shift, ..CASE };
                // Samples without a label: none, some or all. The ignored label may be a class.
                let ignore_label = Some([-1, 0][i / 2 % 2]);
                let ignored = Some([2, 1][(i / 4 + k) % 2]);
                cases.push(match (i + j + k) % 2 {
                    0 => case,
                    _ => Case { ignore_label, ignored, ..case },
                });
            }
        }
    }
    for classes in [1, 33, 300] {
        for variant in VARIANTS {
            for logits in [Logits::Extreme, Logits::Equal, Logits::Sure] {
                for smoothing in [0.0, 0.1] {
                    cases.push(Case { classes, variant, logits, smoothing, ..CASE });
                }
            }
        }
    }
    for variant in VARIANTS {
        cases.push(Case { variant, gradient: false, ..CASE });
        // More samples than a first round of blocks with one each.
        cases.push(Case { variant, batch: 130, classes: 3, ..CASE });
    }
    cases
}

pub fn test(target: &Target<'_>) {
    for case in cases() {
        every_type(case, target);
    }
}

/// Rows of several slices.
pub fn streamed(target: &Target<'_>) {
    for (i, classes) in [4096, 4097, 8193].into_iter().enumerate() {
        for (j, variant) in VARIANTS.into_iter().enumerate() {
            let (batch, shift) = (1 + (i + j) % 2, (i / 2 + j) % 2);
            let case = Case { batch, classes, variant, smoothing: [0.1, 0.0][j % 2], shift, ..CASE };
            evaluate::<f32>(case, target);
            evaluate::<bf16>(Case { shift: 1 - shift, ..case }, target);
        }
    }
    for variant in VARIANTS {
        let case = Case { batch: 1, classes: 4104, variant, ..CASE };
        evaluate::<f16>(Case { gradient: false, ..case }, target);
        let extreme = Case { batch: 2, logits: Logits::Extreme, ..case };
        evaluate::<f32>(Case { ignore_label: Some(-1), ignored: Some(2), ..extreme }, target);
    }
    // A vocabulary.
    evaluate::<bf16>(Case { batch: 1, classes: 1 << 18, variant: Variant::History, ..CASE }, target);
}

/// Right however many blocks share the samples, and however many groups a block has.
pub fn any_grid(target: &Target<'_>) {
    let run = |case: Case, grids: &[(u32, u32)]| {
        let data = Data::<f16>::new(case);
        let want = data.on_cpu().unwrap();
        for &(groups, rows) in grids {
            target.run(case.shift, |machine| {
                let operator = data.operator(machine);
                let mut plan = operator.plan().unwrap();
                for launch in plan.launches_mut() {
                    let words_of_warp = (launch.shared_bytes / 4 - 1) / (launch.block[0] / 32);
                    let group = case.classes.div_ceil(8).next_power_of_two().clamp(32, 512) as u32;
                    launch.grid[1] = rows;
                    launch.block[0] = groups * group;
                    launch.shared_bytes = 4 * (words_of_warp * groups * group / 32 + 1);
                }
                machine.launch(&plan);
                let status = data.check(machine, &operator, &want);
                assert_eq!(status, LossStatus::default(), "{case:?} {plan:?}");
            });
        }
    };
    for variant in VARIANTS {
        for classes in [9, 300] {
            let case = Case { batch: 7, classes, variant, shift: 1, ..CASE };
            run(case, &[(1, 1), (1, 3), (2, 4), (3, 2), (4, 1)]);
        }
    }
    // Three slices.
    run(Case { classes: 8200, variant: Variant::History, ..CASE }, &[(1, 1)]);
}

/// The same plan again: it finds the workspace as it needs it, and the history as it left it.
pub fn again(target: &Target<'_>) {
    for (classes, shift) in [(33, 0), (5000, 1)] {
        let case = Case { classes, variant: Variant::History, shift, ..CASE };
        let mut first = Data::<bf16>::new(case);
        first.case.smoothing = 0.0;
        let want = first.on_cpu().unwrap();
        let second = Data { table: want.table.clone(), ..first.clone() };
        let want_second = second.on_cpu().unwrap();
        // The logits have not changed since.
        assert_eq!(want_second.values[2], 0.0);
        target.run(shift, |machine| {
            let operator = first.operator(machine);
            let plan = operator.plan().unwrap();
            machine.launch(&plan);
            first.check(machine, &operator, &want);
            let gradient = machine.read::<bf16>(operator.gradient.unwrap());
            machine.launch(&plan);
            second.check(machine, &operator, &want_second);
            // From the same history the same bits.
            let Partner::History { table, .. } = operator.partner else { unreachable!("the case has it") };
            machine.write(table, &first.table);
            machine.launch(&plan);
            assert!(machine.read::<bf16>(operator.gradient.unwrap()) == gradient);
        });
    }
}

/// Wrong labels and indices are skipped, and reported as the CPU does.
pub fn wrong_data(target: &Target<'_>) {
    let labels: [&[i64]; 5] = [
        &[0, 9, -1, 10, 3],
        &[i64::MIN, i64::MAX, 4, -5, -5],
        &[-5, 1, 1 << 32, 2, 1 << 31],
        &[10, 10, 10, 10, 10],
        &[5, 6, 7, 8, -5],
    ];
    let indices: [&[i64]; 6] = [
        &[6, 0, 3, 1, 2],
        &[0, 7, 3, -1, 3],
        &[3, 3, 3, 7, 3],
        &[i64::MAX, i64::MIN, i64::MAX, 1, 1 << 32],
        &[4, 1, 2, 1, 4],
        &[-1, -1, 5, 5, 0],
    ];
    let finding = |wrong: Vec<usize>, values: &[i64]| {
        let first = wrong.first().map_or((0, 0), |&i| (i as u64, values[i]));
        Finding { count: wrong.len() as u64, position: first.0, value: first.1 }
    };
    let check = |data: &Data<f32>| {
        let Data { case, ref labels, ref index, .. } = *data;
        let positions = || 0..case.batch;
        let wrong = positions().filter(|&i| !data.is_labelled(i) && Some(labels[i]) != case.ignore_label);
        let in_table = |i: &usize| (0..case.rows() as i64).contains(&index[*i]);
        let (inside, outside): (Vec<usize>, Vec<usize>) = match case.variant {
            Variant::History => positions().partition(in_table),
            _ => (Vec::new(), Vec::new()),
        };
        let repeated = inside.into_iter().filter(|&i| !data.has_row(i)).collect();
        let want_status = LossStatus {
            labels: finding(wrong.collect(), labels),
            indices: finding(outside, index),
            repeated: finding(repeated, index),
        };
        let want = data.forgiving();
        let error = data.on_cpu().err();
        target.run(case.shift, |machine| {
            let operator = data.operator(machine);
            machine.launch(&operator.plan().unwrap());
            let status = data.check(machine, &operator, &want);
            assert_eq!(status, want_status, "{case:?} {labels:?} {index:?}");
            assert_eq!(status.check(case.classes, case.rows()).err(), error);
        });
    };
    for classes in [10, 4200] {
        // More of the large ones would show nothing new.
        let some = if classes == 10 { 6 } else { 2 };
        for variant in VARIANTS {
            for labels in labels.iter().take(some) {
                for ignore_label in [None, Some(-5)] {
                    let case = Case { batch: 5, classes, variant, ignore_label, shift: 1, ..CASE };
                    check(&Data { labels: labels.to_vec(), ..Data::new(case) });
                }
            }
        }
        for index in indices.iter().take(some) {
            let case = Case { batch: 5, classes, variant: Variant::History, ..CASE };
            let data = Data { index: index.to_vec(), ..Data::new(case) };
            check(&data);
            let labels = vec![1, 2, 3, 4, classes as i64];
            check(&Data { labels, ..data });
        }
    }
}

/// NaN and infinity come out where IEEE 754 has them, and nowhere else.
pub fn not_a_number(target: &Target<'_>) {
    let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let cases = [Variant::None, Variant::TwoBranch, Variant::History].map(|variant| (10, variant));
    for (classes, variant) in cases.into_iter().chain([(4200, Variant::None)]) {
        // One such logit in sample 1, its second half (all of the last slice), or nothing else.
        let places = [classes + 1..classes + 2, classes + classes / 2..2 * classes, classes..2 * classes];
        for (value, wrong) in values.into_iter().flat_map(|value| places.clone().map(|place| (value, place)))
        {
            let case = Case { classes, variant, smoothing: 0.0, ..CASE };
            let mut data = Data::<f32>::new(case);
            data.labels.fill(0);
            data.logits[wrong].fill(value);
            let want = data.on_cpu().unwrap();
            target.run(0, |machine| {
                let operator = data.operator(machine);
                machine.launch(&operator.plan().unwrap());
                let gradient = wide(&machine.read::<f32>(operator.gradient.unwrap()));
                let values = wide(&machine.read::<f32>(operator.values));
                for (got, want) in gradient.iter().zip(&want.gradient).chain(values.iter().zip(&want.values))
                {
                    let same = got == want || got.is_nan() && want.is_nan();
                    assert!(
                        same || want.is_finite() && distance(&[*got], &[*want]) <= 1e-5 * want.abs(),
                        "{case:?} {got} {want}"
                    );
                }
            });
        }
    }
}

/// The safe method, on half-open views of larger tensors.
pub fn safe_method(opened: &device::Opened) {
    let device::Opened { device, stream } = opened;
    for case in cases() {
        let data = Data::<f16>::new(case);
        let (want, shift) = (data.on_cpu().unwrap(), case.shift);
        let settings = case.settings();
        let (logits, labels) = (opened.upload(shift, &data.logits), opened.upload(shift, &data.labels));
        // A copy of nothing would be refused.
        let or_one = |values: &[f32]| if values.is_empty() { vec![0.0] } else { values.to_vec() };
        let mut table = opened.upload(shift, &or_one(&data.table));
        let index = opened.upload(shift, if data.index.is_empty() { &[0] } else { &data.index });
        let mut gradient = opened.upload(shift, &vec![f16::NAN; data.logits.len()]);
        let mut values = opened.upload(shift, &[f32::NAN; 3]);
        let mut status = opened.upload(shift, &[u64::MAX; LossStatus::WORDS]);
        let mut workspace = stream.alloc_zeros::<u32>(settings.workspace_len(case.batch)).unwrap();
        let index = index.slice(shift..);
        let mut rows = table.slice_mut(shift..);
        let mut to = gradient.slice_mut(shift..);
        device
            .loss::<f16>(
                &settings,
                LossInputs::new(&logits.slice(shift..), Targets::Labels(&labels.slice(shift..))),
                match case.variant {
                    Variant::None => Consistency::None,
                    Variant::TwoBranch => Consistency::TwoBranch,
                    Variant::History => Consistency::History { table: &mut rows, index: &index },
                },
                LossOutputs {
                    gradient: case.gradient.then_some(&mut to as _),
                    ..LossOutputs::new(
                        &mut values.slice_mut(shift..),
                        &mut status.slice_mut(shift..),
                        &mut workspace,
                    )
                },
                stream,
            )
            .unwrap();
        let what = format!("{case:?}");
        assert_values(&what, &opened.download(shift, &values), &want);
        let words: Vec<u64> = opened.download(shift, &status);
        assert_eq!(LossStatus::new(words.try_into().unwrap()), LossStatus::default());
        if case.gradient {
            assert_close("dlogits", &case, &opened.download(shift, &gradient), &want.unfused, &want.gradient);
        }
        if case.variant == Variant::History {
            assert!(opened.download(shift, &table) == want.table, "{what}");
        }
    }
}

/// A captured loss reads labels anew at each replay, and finds the workspace as it needs it.
pub fn in_a_graph(opened: &device::Opened) {
    let device::Opened { device, stream } = opened;
    for classes in [100, 5000] {
        let case = Case { batch: 70, classes, ..CASE };
        let mut data = Data::<f32>::new(case);
        let logits = opened.upload(0, &data.logits);
        let mut labels = opened.upload(0, &data.labels);
        let mut gradient = opened.upload(0, &vec![f32::NAN; data.logits.len()]);
        let mut values = opened.upload(0, &[f32::NAN; 3]);
        let mut status = opened.upload(0, &[u64::MAX; LossStatus::WORDS]);
        let mut workspace = stream.alloc_zeros::<u32>(case.settings().workspace_len(case.batch)).unwrap();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        let outputs = LossOutputs {
            gradient: Some(&mut gradient),
            ..LossOutputs::new(&mut values, &mut status, &mut workspace)
        };
        device
            .loss::<f32>(
                &case.settings(),
                LossInputs::new(&logits, Targets::Labels(&labels)),
                Consistency::TwoBranch,
                outputs,
                stream,
            )
            .unwrap();
        let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("something was captured");
        for step in 0..3 {
            data.labels.iter_mut().for_each(|label| *label = (*label + step) % classes as i64);
            stream.memcpy_htod(&data.labels, &mut labels).unwrap();
            graph.launch().unwrap();
            let want = data.on_cpu().unwrap();
            assert_values("replay", &opened.download(0, &values), &want);
            assert_close("dlogits", &"replay", &opened.download(0, &gradient), &want.unfused, &want.gradient);
        }
    }
}
