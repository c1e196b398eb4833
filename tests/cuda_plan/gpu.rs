//! What plans know of a device, and the names of families.

use pace_kernels::Error;
use pace_kernels::cuda::{Family, Gpu};
use std::collections::HashSet;

#[test]
fn families_have_names_of_their_own() {
    let names = Family::ALL.map(Family::name);
    assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
    for family in Family::ALL {
        assert_eq!(family.name().parse(), Ok(family));
    }
    for name in ["", "SM80", "sm80 ", " cublaslt", "cublasLt", "cublas", "sm", "sm90a", "sm80,cublaslt"] {
        let Err(unknown @ Error::Argument { argument: "family", .. }) = name.parse::<Family>() else {
            panic!("{name} is a family");
        };
        names.iter().for_each(|name| assert!(unknown.to_string().contains(&format!("`{name}`"))));
    }
}

#[test]
fn a_forced_family_changes_nothing_else() {
    for gpu in [Gpu::A100, Gpu::RTX_4090, Gpu::H100] {
        assert_eq!(gpu.family, None);
        for family in Family::ALL {
            let forced = gpu.with_family(family);
            assert_eq!(forced.family, Some(family));
            assert_eq!(Gpu { family: None, ..forced }, gpu);
            let other = if family == Family::Sm80 { Family::CublasLt } else { Family::Sm80 };
            assert_eq!(forced.with_family(other), gpu.with_family(other));
        }
    }
}

#[test]
fn a_family_runs_where_its_needs_are_met() {
    for (capability, has_cublaslt, has_sm90, want) in [
        ((7, 5), false, true, [false, false, false]),
        ((7, 5), true, true, [false, false, true]),
        ((8, 0), false, true, [true, false, false]),
        ((8, 9), true, true, [true, false, true]),
        ((9, 0), false, true, [true, true, false]),
        ((9, 0), true, false, [true, false, true]),
        ((12, 0), true, true, [true, false, true]),
    ] {
        let gpu = Gpu { capability, has_cublaslt, has_sm90, ..Gpu::A100 };
        assert_eq!(Family::ALL.map(|family| family.is_available(&gpu)), want, "{gpu:?}");
        // Whether it is forced does not matter.
        for forced in Family::ALL {
            let gpu = gpu.with_family(forced);
            assert_eq!(Family::ALL.map(|family| family.is_available(&gpu)), want, "{gpu:?}");
        }
    }
}
