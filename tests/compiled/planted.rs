//! Whether `hazards.rs` finds what it is for: faults planted in small pieces of machine code, and in kernels that are compiled like
//! the crate's own.

use crate::hazards::{Found, check};
use crate::kernels::Source;
use crate::sass::Instruction;
use crate::{Tools, nvcc, verdict};
use libtest_mimic::{Completion, Failed, Trial};
use std::path::Path;

/// Name, machine code without addresses (`L0:` is a label, and a branch to it is `BRA L0`), and the beginning of each hazard.
const PIECES: &[(&str, &str, &[&str])] = &[
    (
        "correct",
        "LDSM.16.M88.4 R100, [R3]
         WARPGROUP.ARRIVE
         HGMMA.64x128x16.F32.BF16 R24, R100, gdesc[UR8], R24, !UPT
         HGMMA.64x128x16.F32.BF16 R24, R104, gdesc[UR8], R24, gsb0
         IADD3 R88, R100, R23, RZ
         WARPGROUP.DEPBAR.LE gsb0, 0x0
         LDSM.16.M88.4 R100, [R3]
         STG.E.128 desc[UR8][R2.64], R24
         EXIT",
        &[],
    ),
    (
        "fragment_overwritten",
        "HGMMA.64x128x16.F32.BF16 R24, R100, gdesc[UR8], RZ, !UPT, gsb0
         IMAD.MOV.U32 R103, RZ, RZ, R5
         WARPGROUP.DEPBAR.LE gsb0, 0x0
         EXIT",
        &["IMAD.MOV.U32 R103"],
    ),
    (
        // Only the last of four registers is one of the fragment's.
        "fragment_overwritten_by_a_wide_load",
        "HGMMA.64x128x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0
         LDSM.16.MT88.4 R97, [R3+UR4]
         LDG.E.64 R98, desc[UR4][R2.64]
         LDS.128 R96, [R3]
         IMAD.WIDE.U32 R99, R5, 0x4, R6
         @P0 SHFL.IDX PT, R101, R4, R3, 0x1f
         UNHEARDOF R97, R5
         STS.128 [R3], R100
         WARPGROUP.DEPBAR.LE gsb0, 0x0
         EXIT",
        &["LDSM", "IMAD.WIDE", "SHFL", "UNHEARDOF"],
    ),
    (
        "accumulator_touched",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
         F2FP.BF16.F32.PACK_AB R4, R87, R86
         FADD R24, R4, R5
         STG.E.128 desc[UR8][R2.64], R21
         FADD R4, R88, R23
         ISETP.NE.AND P0, PT, R30.reuse, RZ, PT
         IMAD.WIDE R4, R23, R88, R22
         WARPGROUP.DEPBAR.LE gsb0, 0x0
         EXIT",
        &["F2FP", "FADD R24", "STG", "ISETP"],
    ),
    (
        // A group is what ends with gsb0; waiting for all but one leaves the second in flight.
        "one_group_of_two_retired",
        "HGMMA.64x8x16.F32.BF16 R24, R100, gdesc[UR8], R24
         HGMMA.64x8x16.F32.BF16 R24, R104, gdesc[UR8], R24, gsb0
         HGMMA.64x8x16.F32.BF16 R32, R108, gdesc[UR8], R32, gsb0
         WARPGROUP.DEPBAR.LE gsb0, 0x1
         MOV R100, R24
         MOV R104, R27
         MOV R4, R32
         EXIT",
        &["MOV R4, R32"],
    ),
    (
        // Nothing has closed its group, so that nothing waits for it.
        "open_group",
        "HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24
         WARPGROUP.DEPBAR.LE gsb0, 0x0
         MOV R4, R24
         EXIT",
        &["MOV R4, R24"],
    ),
    (
        // Right in the first pass.
        "weak_wait_in_a_loop",
        "L0:
         LDSM.16.M88.4 R100, [R3]
         WARPGROUP.ARRIVE
         HGMMA.64x8x16.F32.BF16 R24, R100, gdesc[UR8], R24, UP0, gsb0
         WARPGROUP.DEPBAR.LE gsb0, 0x1
         @!P0 BRA L0
         WARPGROUP.DEPBAR.LE gsb0, 0x0
         MOV R4, R24
         EXIT",
        &["LDSM.16.M88.4 R100"],
    ),
    (
        "two_fragments_by_turns",
        "L0:
         WARPGROUP.DEPBAR.LE gsb0, 0x1
         LDSM.16.M88.4 R100, [R3]
         HGMMA.64x8x16.F32.BF16 R24, R100, gdesc[UR8], R24, UP0, gsb0
         WARPGROUP.DEPBAR.LE gsb0, 0x1
         LDSM.16.M88.4 R104, [R3]
         HGMMA.64x8x16.F32.BF16 R32, R104, gdesc[UR8], R32, UP0, gsb0
         @!P0 BRA L0
         WARPGROUP.DEPBAR.LE gsb0, 0x0
         MOV R4, R24
         EXIT",
        &[],
    ),
    (
        // The wait is jumped over.
        "wait_on_one_path",
        "HGMMA.64x8x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0
         BSSY B0, L1
         @P0 BRA L0
         WARPGROUP.DEPBAR.LE gsb0, 0x0
         BSYNC B0
         L0:
         BSYNC B0
         NOP
         L1:
         MOV R4, R25
         EXIT",
        &["MOV R4, R25"],
    ),
    (
        "wait_under_a_predicate",
        "HGMMA.64x8x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0
         @P0 WARPGROUP.DEPBAR.LE gsb0, 0x0
         MOV R100, R4
         EXIT",
        &["MOV R100, R4"],
    ),
    (
        "in_a_function",
        "HGMMA.64x8x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0
         CALL.REL.NOINC L0
         MOV R4, R25
         EXIT
         L0:
         MOV R101, R5
         RET.REL.NODEC R2 0x0",
        &["MOV R4, R25", "MOV R101, R5"],
    ),
    (
        "behind_an_indirect_branch",
        "HGMMA.64x8x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0
         BRX R2 -0x140
         MOV R100, R5
         EXIT
         MOV R101, R5
         EXIT",
        &["MOV R100, R5", "MOV R101, R5"],
    ),
    (
        "wgmmas_in_each_others_way",
        "HGMMA.64x8x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0
         HGMMA.64x8x16.F32.BF16 R40, R24, gdesc[UR8], R40, gsb0
         HGMMA.64x8x16.F32.BF16 R26, R100, gdesc[UR8], R26, gsb0
         HGMMA.64x8x16.F32.BF16 R100, R104, gdesc[UR8], R100, gsb0
         WARPGROUP.DEPBAR.LE gsb0, 0x0
         EXIT",
        &[
            "HGMMA.64x8x16.F32.BF16 R40",
            "HGMMA.64x8x16.F32.BF16 R26",
            "HGMMA.64x8x16.F32.BF16 R26",
            "HGMMA.64x8x16.F32.BF16 R100",
            "HGMMA.64x8x16.F32.BF16 R100",
        ],
    ),
    (
        // More groups than a wait can tell apart.
        "never_waits",
        "L0:
         HGMMA.64x8x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0
         @!P0 BRA L0
         WARPGROUP.DEPBAR.LE gsb0, 0x7
         MOV R100, R5
         WARPGROUP.DEPBAR.LE gsb0, 0x0
         MOV R101, R24
         EXIT",
        &["MOV R100, R5"],
    ),
];

/// The trials that need no compiler.
pub fn trials() -> Vec<Trial> {
    let pieces = PIECES.iter().map(|&(name, text, hazards)| {
        Trial::test(format!("piece::{name}"), move || {
            let found = check(&assemble(text))?;
            // Without their addresses.
            let texts =
                found.hazards.iter().filter_map(|hazard| hazard.split_once(' ')).map(|(_, text)| text);
            let agree = found.hazards.len() == hazards.len()
                && texts.zip(hazards).all(|(text, start)| text.starts_with(start));
            if agree {
                Ok(())
            } else {
                Err(format!("expected {hazards:?}, found {:#?}", found.hazards).into())
            }
        })
    });
    let others =
        [Trial::test("piece::serialised", serialised), Trial::test("piece::not_understood", not_understood)];
    pieces.chain(others).collect()
}

/// Instructions at addresses 0x0, 0x10, ...
fn assemble(text: &str) -> Vec<Instruction> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let mut labels = Vec::new();
    let mut instructions = Vec::new();
    for line in lines {
        match line.strip_suffix(':') {
            Some(label) => labels.push((label, instructions.len() * 16)),
            None => instructions.push(line),
        }
    }
    let placed = instructions.iter().enumerate().map(|(index, line)| {
        let line = labels.iter().fold((*line).to_owned(), |line, (label, address)| {
            line.replace(&format!(" {label}"), &format!(" {address:#x}"))
        });
        let line = format!("        /*{:04x}*/  {line} ;  /* 0x0 */", index * 16);
        Instruction::read(&line).unwrap_or_else(|| panic!("no instruction in {line}"))
    });
    placed.collect()
}

fn serialised() -> Result<(), Failed> {
    let one = "WARPGROUP.ARRIVE
               HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
               UMOV UR4, UR5
               WARPGROUP.DEPBAR.LE gsb0, 0x0\n";
    let group = "WARPGROUP.ARRIVE
                 HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24
                 HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
                 WARPGROUP.DEPBAR.LE gsb0, 0x0\n";
    for (text, expected) in [
        (format!("{one}{one}EXIT"), true),
        (format!("L0:\n{one}@P0 BRA L0\n{one}EXIT"), true),
        (format!("{one}EXIT"), false),
        (format!("{group}{one}EXIT"), false),
        ("EXIT".into(), false),
    ] {
        let found = check(&assemble(&text))?;
        if found.is_serialised() != expected || !found.hazards.is_empty() {
            return Err(format!("{found:?} in {text}").into());
        }
    }
    Ok(())
}

/// What is not known is no reason to pass.
fn not_understood() -> Result<(), Failed> {
    let wgmma = "HGMMA.64x8x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0";
    for line in [
        "HGMMA R24, R100, gdesc[UR8], R24",
        "HGMMA.64x8x16.F32.BF16 R24, R100, R104, R24",
        "HGMMA.64x8x16.F32.BF16 R24, R100, gdesc[UR8], R40",
        "WARPGROUP.DEPBAR.LE gsb1, 0x0",
        "WARPGROUP.DEPBAR.LE gsb0, R4",
        "WARPGROUP.UNHEARDOF",
        "DEPBAR.LE gsb0, 0x0",
        "BRA 0x1230",
    ] {
        if let Ok(found) = check(&assemble(&format!("{wgmma}\n{line}\nEXIT"))) {
            return Err(format!("{line}: {found:?}").into());
        }
    }
    Ok(())
}

/// The kernels of `planted.cu`, compiled as kernels for Hopper are: their names say whether they are right. ptxas' word that it
/// serialises wgmmas is an error.
pub fn compiled(tools: &Tools) -> Result<Completion, Failed> {
    let nvcc = nvcc::Nvcc::from_environment(&|name| std::env::var_os(name))
        .map_err(|_| "nvcc is gone since the kernels were built")?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compiled");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("compiled");
    std::fs::create_dir_all(&folder)?;
    let compile = |name: &str| {
        let source = Source { file: format!("sm90/{name}"), path: sources.join(name).with_extension("cu") };
        nvcc.compile(&[source], &folder, 1, &|_| {})
    };
    if compile("planted")?.is_empty() {
        return Ok(Completion::ignored_with("PACE_CUDA_ARCHS asks for other architectures"));
    }
    let mut problems = Vec::new();
    for ((_, name), code) in tools.take_apart(&folder.join("sm90_planted.fatbin"))? {
        let Found { wgmmas, hazards, .. } = check(&code.instructions)?;
        if wgmmas == 0 || hazards.is_empty() != name.starts_with("right_") {
            problems.push(format!("{name}: {wgmmas} wgmmas, hazards: {hazards:#?}"));
        }
    }
    match compile("serialised") {
        Err(why) if why.contains("made slow code") => {}
        other => problems.push(format!("a file with serialised wgmmas: {other:?}")),
    }
    verdict(&problems)
}
