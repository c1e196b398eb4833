//! The parts of the build script that decide something: finding nvcc, its version, architectures, what is out of date.

// The build script uses all of it.
#[allow(dead_code)]
#[path = "../build/kernels.rs"]
mod kernels;
#[allow(dead_code)]
#[path = "../build/nvcc.rs"]
mod nvcc;

use kernels::{Group, Source, groups, sources, table};
use nvcc::{
    Nvcc, Ptxas, Targets, Unusable, archs, check_archs, find, is_newer, only_capability, prerequisites,
    release, targets,
};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

/// An empty folder of its own for each test.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("build_script").join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn file(path: &Path, contents: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, contents).unwrap();
}

#[test]
fn nvcc_is_looked_for_in_the_documented_order() {
    let folder = folder("find");
    let name = format!("nvcc{}", std::env::consts::EXE_SUFFIX);
    let places = ["home/bin", "path/bin", "search/a", "search/b"].map(|place| folder.join(place).join(&name));
    for place in &places {
        file(place, "");
    }
    let own = folder.join("my-nvcc");
    file(&own, "");
    let search =
        std::env::join_paths([folder.join("none"), folder.join("search/a"), folder.join("search/b")]);
    let mut variables: Vec<(&str, OsString)> = vec![
        ("NVCC", own.clone().into()),
        ("CUDA_HOME", folder.join("home").into()),
        ("CUDA_PATH", folder.join("path").into()),
        ("PATH", search.unwrap()),
    ];
    for want in [&own, &places[0], &places[1], &places[2]] {
        let lookup =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
        assert_eq!(find(&lookup).unwrap().as_ref(), Some(want));
        variables.remove(0);
    }
    // An empty variable is one that is not set; a folder without nvcc is passed over.
    let lookup = |variable: &str| match variable {
        "NVCC" => Some(OsString::new()),
        "CUDA_HOME" => Some(folder.join("none").into()),
        "CUDA_PATH" => Some(folder.join("path").into()),
        _ => None,
    };
    assert_eq!(find(&lookup).unwrap().as_ref(), Some(&places[1]));
    // One that is asked for by name has to be there.
    let lookup = |variable: &str| (variable == "NVCC").then(|| folder.join("none").into());
    assert!(find(&lookup).unwrap_err().contains("is not a file"));
}

#[test]
fn releases_are_read() {
    let text = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0";
    assert_eq!(release(text), Some((13, 0)));
    assert_eq!(release("Cuda compilation tools, release 11.8, V11.8.89"), Some((11, 8)));
    for text in ["", "release", "release 13", "release x.y", "gcc 12.2"] {
        assert_eq!(release(text), None, "{text}");
    }
}

#[test]
fn architectures_are_read() {
    let read = |list| archs(list).map(|archs| archs.join(" "));
    assert_eq!(read(nvcc::DEFAULT_ARCHS).as_deref(), Ok("80 90a"));
    assert_eq!(read("80, 86;90a  100f;80").as_deref(), Ok("80 86 90a 100f"));
    for (list, why) in
        [("", "is empty"), (";", "is empty"), ("75", "80 (Ampere) or newer"), ("sm_80", "has `sm_80`")]
    {
        assert!(read(list).unwrap_err().contains(why), "{list}");
    }
    let known = "compute_75\ncompute_80\ncompute_90\n";
    let check = |list| check_archs(&archs(list).unwrap(), known);
    assert_eq!(check("80;90a"), Ok(()));
    let error = check("80;100a").unwrap_err();
    assert!(
        error.contains("100a") && error.contains("75, 80, 90") && error.contains("PACE_CUDA_ARCHS"),
        "{error}"
    );
    assert!(check_archs(&archs("90").unwrap(), "compute_90").unwrap_err().contains("80"), "the PTX floor");
}

/// The folder decides the architectures.
#[test]
fn families_have_their_own_architectures() {
    let targets_of = |family, list| targets(family, &archs(list).unwrap());
    for family in ["", "sm80"] {
        let images = ["80", "86", "90", "120"].map(String::from).to_vec();
        let targets = targets_of(family, "86;90;80;90a;120f");
        assert_eq!(targets, Ok(Targets { images, ptx: Some("80") }), "{family}");
        assert_eq!(only_capability(family), None);
    }
    for (list, images) in
        [("80;90a", &["90a"][..]), ("90", &["90a"]), ("90;90a;100a", &["90a"]), ("80;100a", &[])]
    {
        let images = images.iter().map(|&arch| arch.into()).collect();
        assert_eq!(targets_of("sm90", list), Ok(Targets { images, ptx: None }), "{list}");
    }
    assert_eq!(only_capability("sm90"), Some((9, 0)));
    assert!(targets_of("sm70", "80").unwrap_err().contains("kernels/sm70"));
}

#[test]
fn sources_are_found_in_families() {
    let folder = folder("sources");
    for path in ["b.cu", "a.cuh", "README.md", "sm80/b.cu", "sm80/a.cu", "sm90/b.cu", "sm90/ptx.cuh"] {
        file(&folder.join(path), "");
    }
    let found = sources(&folder).unwrap();
    let names: Vec<_> =
        found.iter().map(|source| (&*source.file, source.family(), source.flat_name())).collect();
    assert_eq!(
        names,
        [
            ("b", "", "b".into()),
            ("sm80/a", "sm80", "sm80_a".into()),
            ("sm80/b", "sm80", "sm80_b".into()),
            ("sm90/b", "sm90", "sm90_b".to_owned()),
        ]
    );
    assert_eq!(found[1].path, folder.join("sm80").join("a.cu"));
    assert!(sources(&folder.join("none")).unwrap_err().contains("none"));
}

#[test]
fn kernels_are_read() {
    let text = "#define PACE_KERNEL_OF(name) \\\n    PACE_KERNEL(name##_f32, \\\n// PACE_KERNEL(no, P)\n\
                PACE_KERNEL(norm, Params, 256) { total(p); }\nPACE_KERNELS(loss, Params, (512), f<T>(p))\n\
                PACE_KERNELS_F32(y, Params, (256), f<T>(p))\nPACE_KERNELS_16(y, Params, (256, 4), f<T>(p))\n\
                PACE_GEMM_KERNELS(linear, Params, (256), f<Math>(p))\nPACE_KERNELS_16(z, Params, (1), f(p))\n";
    let group =
        |name: &str, suffixes: &[&'static str]| Group { name: name.into(), suffixes: suffixes.to_vec() };
    let expected = [
        group("norm", &[""]),
        group("loss", &["_f32", "_f16", "_bf16"]),
        group("y", &["_f32", "_f16", "_bf16"]),
        group("linear", &["_f32", "_tf32", "_f16", "_bf16"]),
        group("z", &["_f16", "_bf16"]),
    ];
    assert_eq!(groups(text).as_deref(), Ok(&expected[..]));
    assert_eq!(expected[4].kernels().collect::<Vec<_>>(), ["z_f16", "z_bf16"]);
    assert!(groups("PACE_KERNELS_64(a, Params, (1), f(p))").unwrap_err().contains("PACE_KERNELS_64"));
    assert!(groups("PACE_KERNELS(\n    a, Params, (1), f(p))").unwrap_err().contains("one line"));
}

#[test]
fn the_table_has_every_kernel() {
    let folder = folder("table");
    let gemm = source(&folder, "sm80/linear", "PACE_GEMM_KERNELS(linear, Params, (256), f<Math>(p))\n");
    let half = source(&folder, "sm90/half", "PACE_CLUSTER_KERNELS_16(half, Params, 2, (256), f<T>(p))\n");
    let norm =
        source(&folder, "norm", "PACE_KERNEL(norm, Params, 1) {}\nPACE_KERNELS(loss, P, (1), f<T>(p))\n");
    let rust = table(&[norm.clone(), gemm.clone(), half]).unwrap();
    let (list, constants) = rust.split_once("];\n").unwrap();
    assert_eq!(list.matches("Kernel {").count(), 1 + 3 + 4 + 2, "{list}");
    assert!(list.contains(r#"Kernel { file: "sm80/linear", name: "linear_tf32" },"#), "{list}");
    assert!(
        constants.contains(r#"const NORM: Kernel = Kernel { file: "norm", name: "norm" };"#),
        "{constants}"
    );
    for (name, kind, fields) in [
        ("LOSS", "Kernels", &["f32: ", "f16: ", "bf16: "][..]),
        ("LINEAR", "GemmKernels", &["f32: ", "tf32: ", "f16: ", "bf16: "]),
        ("HALF", "Kernels16", &["f16: ", "bf16: "]),
    ] {
        let start = format!("pub(crate) const {name}: {kind} = {kind} {{\n");
        let (_, rest) = constants.split_once(&start).unwrap_or_else(|| panic!("no `{start}` in {constants}"));
        let lines = rest.lines().take_while(|line| *line != "};");
        assert!(lines.eq(rest.lines().take(fields.len())), "{rest}");
        assert!(rest.lines().zip(fields).all(|(line, field)| line.trim().starts_with(field)), "{rest}");
    }

    // One program has all kernels, so that names have to differ between files too.
    let twice = source(&folder, "sm90/again", "PACE_KERNEL(loss_f16, Params, 1) {}\n");
    assert!(table(&[norm, twice]).unwrap_err().contains("another kernel loss_f16"));
    let odd = source(&folder, "single", "PACE_KERNELS_F32(odd, Params, (1), f<T>(p))\n");
    assert!(table(&[odd]).unwrap_err().contains("no struct in src/cuda/kernel.rs"));
}

#[test]
fn depfiles_are_read() {
    let paths = |text| prerequisites(text).iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
    assert_eq!(
        paths("a.fatbin : a.cu \\\n    /b/c.h \\\r\n  with\\ space.h\n\nother: rule\n"),
        ["a.cu", "/b/c.h", "with space.h"]
    );
    assert_eq!(paths("C:/out/a.fatbin : C:/a.cu\n"), ["C:/a.cu"]);
    assert!(paths("").is_empty());
}

#[test]
fn outputs_are_compared_with_everything_they_were_made_of() {
    let folder = folder("newer");
    let [output, depfile, source, header] = ["o", "d", "s", "h"].map(|name| folder.join(name));
    let age = |path: &Path, seconds| {
        let time = SystemTime::now() - Duration::from_secs(seconds);
        fs::File::options().append(true).open(path).unwrap().set_modified(time).unwrap();
    };
    for (path, seconds) in [(&source, 30), (&header, 20), (&output, 10)] {
        file(path, "");
        age(path, seconds);
    }
    assert!(!is_newer(&output, &depfile), "no depfile yet");
    file(&depfile, &format!("o : {} \\\n {}\n", source.display(), header.display()));
    assert!(is_newer(&output, &depfile));
    age(&header, 5);
    assert!(!is_newer(&output, &depfile));
    fs::remove_file(&header).unwrap();
    assert!(!is_newer(&output, &depfile));
    assert!(!is_newer(&folder.join("none"), &depfile));
}

/// A script in place of nvcc that logs what it is asked to compile.
#[cfg(unix)]
fn fake_nvcc(path: &Path, release: &str) {
    use std::os::unix::fs::PermissionsExt;
    let script = format!(
        r#"#!/bin/sh
case "$1" in
-ptx) kind=ptx;;
-fatbin) kind=fatbin;;
--version) echo "Cuda compilation tools, release {release}, V{release}.1"; exit;;
--list-gpu-arch) echo compute_80; echo compute_90; exit;;
esac
echo "$*" >> "$(dirname "$0")/log"
while [ $# -gt 1 ]; do
    case "$1" in -MF) depfile="$2";; -o) output="$2";; esac
    shift
done
grep -q broken "$1" && {{ echo "error: it is broken"; exit 2; }}
grep -q serialised "$1" && echo "ptxas info : (C7510) Potential Performance Loss: wgmma" >&2
cp "$1" "$output.contents"
echo $kind > "$output"
echo "$output : $1" > "$depfile"
"#
    );
    file(path, &script);
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The same in place of ptxas.
#[cfg(unix)]
fn fake_ptxas(path: &Path, release: &str) {
    use std::os::unix::fs::PermissionsExt;
    let script = format!(
        r#"#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.1"; exit;;
esac
echo "$*" >> "$(dirname "$0")/log"
while [ $# -gt 1 ]; do
    case "$1" in -o) output="$2";; esac
    shift
done
grep -q ptx "$1" || exit 2
grep -q slow "$1.contents" && echo "ptxas info : (C7510) Potential Performance Loss: wgmma" >&2
echo cubin > "$output"
"#
    );
    file(path, &script);
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[cfg(unix)]
#[test]
fn sources_are_compiled_once_and_again_when_something_changed() {
    let folder = folder("compile");
    let (path, log) = (folder.join("nvcc"), folder.join("log"));
    fake_nvcc(&path, "12.4");
    let open = |archs: &'static str| {
        let variable = |name: &str| match name {
            "NVCC" => Some(path.clone().into()),
            "PACE_CUDA_ARCHS" => Some(archs.into()),
            "NVCC_CCBIN" => Some("my-g++".into()),
            _ => None,
        };
        Nvcc::from_environment(&variable).unwrap_or_else(|_| panic!("the script is a usable nvcc"))
    };
    let sources: Vec<Source> = (0..5).map(|i| source(&folder, &i.to_string(), "fine")).collect();
    let compiled = || fs::read_to_string(&log).unwrap().lines().count();

    let nvcc = open("90a");
    let lines = Mutex::new(Vec::new());
    let progress = |line: &str| lines.lock().unwrap().push(line.to_owned());
    assert_eq!(nvcc.compile(&sources, &folder, 3, &progress).as_deref(), Ok(&sources[..]));
    assert_eq!(compiled(), 5);
    assert!((0..5).all(|i| folder.join(format!("{i}.fatbin")).is_file()));
    let command = fs::read_to_string(&log).unwrap();
    for argument in
        ["arch=compute_80,code=sm_90 ", "arch=compute_80,code=compute_80", "-ccbin my-g++", "-std=c++17"]
    {
        assert!(command.contains(argument), "{command}");
    }
    let lines = lines.into_inner().unwrap();
    assert_eq!(lines.len(), 10);
    assert!(lines.contains(&"nvcc 12.4: 0.cu, 1 of 5".to_owned()), "{lines:?}");

    let quiet = |line: &str| panic!("nothing is compiled, but this is said: {line}");
    assert_eq!(nvcc.compile(&sources, &folder, 3, &quiet).as_deref(), Ok(&sources[..]));
    assert_eq!(compiled(), 5, "nothing changed");
    let later = SystemTime::now() + Duration::from_secs(2);
    fs::File::options().append(true).open(&sources[2].path).unwrap().set_modified(later).unwrap();
    nvcc.compile(&sources, &folder, 1, &|_| {}).unwrap();
    assert_eq!(compiled(), 6, "one source is newer");
    file(&sources[2].path, "fine");
    open("80").compile(&sources, &folder, 100, &|_| {}).unwrap();
    assert_eq!(compiled(), 11, "another architecture");

    file(&sources[1].path, "broken");
    file(&sources[3].path, "broken");
    let error = open("90a").compile(&sources, &folder, 2, &|_| {}).unwrap_err();
    assert_eq!(error.matches("error: it is broken").count(), 2, "{error}");
}

/// A file of kernels in `folder`.
fn source(folder: &Path, name: &str, contents: &str) -> Source {
    let source = Source { file: name.into(), path: folder.join(name).with_extension("cu") };
    file(&source.path, contents);
    source
}

#[cfg(unix)]
#[test]
fn a_family_is_compiled_for_its_architectures() {
    let folder = folder("families");
    let (path, log) = (folder.join("nvcc"), folder.join("log"));
    fake_nvcc(&path, "13.0");
    let open = |archs: &'static str| {
        let variable = |name: &str| match name {
            "NVCC" => Some(path.clone().into()),
            "PACE_CUDA_ARCHS" => Some(archs.into()),
            _ => None,
        };
        Nvcc::from_environment(&variable).unwrap_or_else(|_| panic!("the script is a usable nvcc"))
    };
    let compile = |archs, sources: &[Source]| open(archs).compile(sources, &folder, 1, &|_| {});
    let names = ["fill", "sm80/linear", "sm90/linear"];
    let mut all = names.map(|name| source(&folder, name, "fine"));
    assert_eq!(compile("80;90", &all).as_deref(), Ok(&all[..]));
    assert!(
        ["fill", "sm80_linear", "sm90_linear"]
            .iter()
            .all(|name| folder.join(name).with_extension("fatbin").is_file())
    );
    let commands = fs::read_to_string(&log).unwrap();
    let codes = |name: &str| {
        let command = commands.lines().find(|line| line.contains(name)).unwrap();
        command.split("code=").skip(1).map(|rest| rest.split(' ').next().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(codes("sm80_linear.fatbin"), ["sm_80", "sm_90", "compute_80"]);
    assert_eq!(codes("sm90_linear.fatbin"), ["sm_90a"]);
    assert!(commands.contains("arch=compute_90a,code=sm_90a "), "{commands}");
    // Nobody asked for Hopper.
    assert_eq!(compile("80", &all).as_deref(), Ok(&all[..2]));

    // Slow code is an error where it can only be a mistake, also the next time, and although this file was fine before.
    compile("90a", &all).unwrap();
    all.iter().for_each(|source| file(&source.path, "serialised"));
    let later = SystemTime::now() + Duration::from_secs(2);
    all.iter().for_each(|source| {
        fs::File::options().append(true).open(&source.path).unwrap().set_modified(later).unwrap()
    });
    for _ in 0..2 {
        let error = compile("90a", &all).unwrap_err();
        assert!(error.contains("Potential Performance Loss: wgmma") && error.contains("sm90"), "{error}");
        assert_eq!(error.matches("made slow code").count(), 1, "{error}");
        // As if the source were older than what nvcc made of it.
        let earlier = SystemTime::now() - Duration::from_secs(10);
        all.iter().for_each(|source| {
            fs::File::options().append(true).open(&source.path).unwrap().set_modified(earlier).unwrap()
        });
    }
    all[0].file = "sm70/fill".into();
    assert!(compile("80", &all).unwrap_err().contains("kernels/sm70"));
}

/// With `PACE_PTXAS` files that are bound to one architecture take two steps, and only they do.
#[cfg(unix)]
#[test]
fn another_ptxas_assembles_what_is_bound_to_one_architecture() {
    let folder = folder("ptxas");
    let (nvcc, ptxas, log) = (folder.join("nvcc"), folder.join("my-ptxas"), folder.join("log"));
    let open = || {
        let variable = |name: &str| match name {
            "NVCC" => Some(nvcc.clone().into()),
            "PACE_PTXAS" => Some(ptxas.clone().into()),
            _ => None,
        };
        Nvcc::from_environment(&variable).unwrap_or_else(|_| panic!("the scripts are usable"))
    };
    fake_nvcc(&nvcc, "13.0");
    fake_ptxas(&ptxas, "13.5");
    let sources = ["fill", "sm90/linear"].map(|name| source(&folder, name, "fine"));
    let compile = || open().compile(&sources, &folder, 1, &|_| {});
    let commands = || fs::read_to_string(&log).unwrap().lines().map(String::from).collect::<Vec<_>>();
    assert_eq!(compile().as_deref(), Ok(&sources[..]));
    let commands_now = commands();
    let [fill, to_ptx, assemble] = &commands_now[..] else { panic!("three commands: {commands_now:?}") };
    assert!(fill.starts_with("-fatbin") && fill.contains("fill.fatbin"), "{fill}");
    assert!(to_ptx.starts_with("-ptx") && to_ptx.contains(" -gencode arch=compute_90a,code=compute_90a -o"));
    let [from, to] = ["ptx", "fatbin"].map(|end| folder.join("sm90_linear").with_extension(end));
    assert_eq!(*assemble, format!("-arch=sm_90a -m64 -O3 -o {} {}", to.display(), from.display()));
    assert_eq!(fs::read_to_string(&to).unwrap(), "cubin\n");

    assert_eq!(compile().as_deref(), Ok(&sources[..]));
    assert_eq!(commands().len(), 3, "nothing changed");
    fake_ptxas(&ptxas, "13.6");
    assert_eq!(compile().as_deref(), Ok(&sources[..]));
    assert_eq!(commands().len(), 5, "another ptxas");

    // What ptxas says is read here too.
    file(&sources[1].path, "slow");
    let later = SystemTime::now() + Duration::from_secs(2);
    fs::File::options().append(true).open(&sources[1].path).unwrap().set_modified(later).unwrap();
    let error = compile().unwrap_err();
    assert!(error.contains("my-ptxas") && error.contains("made slow code"), "{error}");
}

#[cfg(unix)]
#[test]
fn an_unusable_ptxas_is_explained() {
    let folder = folder("unusable_ptxas");
    let path = folder.join("ptxas");
    let open = || Ptxas::from_environment(&|name| (name == "PACE_PTXAS").then(|| path.clone().into()));
    assert!(open().is_err_and(|why| why.contains("is not a file")));
    fake_ptxas(&path, "13.2");
    assert!(open().is_err_and(|why| why.contains("is 13.2; 13.3 or newer is needed")));
    fake_ptxas(&path, "unknown");
    assert!(open().is_err_and(|why| why.contains("of an unknown release")));
    fake_ptxas(&path, "13.3");
    assert!(open().is_ok_and(|found| found.is_some_and(|ptxas| ptxas.path() == path)));
    assert!(Ptxas::from_environment(&|_| Some(OsString::new())).is_ok_and(|found| found.is_none()));
    // It is asked for whatever there is to compile.
    let nvcc = folder.join("nvcc");
    fake_nvcc(&nvcc, "13.5");
    let none = Nvcc::from_environment(&|name| match name {
        "NVCC" => Some(nvcc.clone().into()),
        "PACE_PTXAS" => Some("nowhere".into()),
        _ => None,
    });
    assert!(matches!(none, Err(Unusable::Wrong(why)) if why.contains("PACE_PTXAS is set to nowhere")));
}

/// Hopper's kernels are built by an older ptxas too, with a warning.
#[cfg(unix)]
#[test]
fn an_old_ptxas_is_warned_of() {
    let folder = folder("old_ptxas");
    let [nvcc, ptxas] = ["nvcc", "ptxas"].map(|name| folder.join(name));
    fake_ptxas(&ptxas, "13.3");
    let sources = ["fill", "sm90/linear"].map(|name| source(&folder, name, "fine"));
    let warning = |release, own: bool, built| {
        fake_nvcc(&nvcc, release);
        let variable = |name: &str| match name {
            "NVCC" => Some(nvcc.clone().into()),
            "PACE_PTXAS" if !own => Some(ptxas.clone().into()),
            _ => None,
        };
        Nvcc::from_environment(&variable).unwrap_or_else(|_| panic!("they are usable")).warning(built)
    };
    let text = warning("13.2", true, &sources[..]).expect("a warning");
    assert!(text.contains("ptxas 13.2") && text.contains("PACE_PTXAS") && text.contains("13.3"), "{text}");
    assert_eq!(warning("13.2", true, &sources[..1]), None, "nothing for Hopper");
    assert_eq!(warning("13.2", false, &sources), None, "another ptxas");
    assert_eq!(warning("13.3", true, &sources), None, "a new one");
}

#[cfg(unix)]
#[test]
fn an_unusable_nvcc_is_explained() {
    let folder = folder("unusable");
    let path = folder.join("nvcc");
    let open = |archs: Option<&'static str>| {
        let variable = |name: &str| match name {
            "NVCC" => Some(path.clone().into()),
            "PACE_CUDA_ARCHS" => archs.map(Into::into),
            _ => None,
        };
        Nvcc::from_environment(&variable).map(drop)
    };
    let missing = |result: Result<(), Unusable>, why: &str| {
        assert!(matches!(&result, Err(Unusable::Missing(text)) if text.contains(why)));
    };
    let wrong = |result: Result<(), Unusable>, why: &str| {
        assert!(matches!(&result, Err(Unusable::Wrong(text)) if text.contains(why)));
    };
    wrong(open(None), "is not a file");
    fake_nvcc(&path, "11.8");
    missing(open(None), "is 11.8, but the kernels need 12.0 or newer");
    fake_nvcc(&path, "12.0");
    assert!(open(None).is_ok());
    wrong(open(Some("120")), "does not know architecture 120");
    wrong(open(Some("70")), "80 (Ampere) or newer");
}

/// With `cuda-version-from-build-system`, cudarc's build script panics where nvcc is older or newer than it knows: nothing
/// would build, not even the operators on a CPU.
#[test]
fn dependencies_do_not_ask_nvcc() {
    // By cargo: a packed crate's manifest is written in another form.
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let named = |list: &serde_json::Value, name: &str| {
        list.as_array().unwrap().iter().find(|item| item["name"] == name).expect(name).clone()
    };
    let cudarc = named(&named(&metadata["packages"], "pace-kernels")["dependencies"], "cudarc");
    let features: Vec<_> =
        cudarc["features"].as_array().unwrap().iter().map(|f| f.as_str().unwrap()).collect();
    assert!(!features.iter().any(|feature| feature.contains("-from-build-system")), "{features:?}");
    let is_version = |f: &&&str| f.strip_prefix("cuda-").is_some_and(|v| v.parse::<u32>().is_ok());
    assert_eq!(features.iter().filter(is_version).count(), 1, "{features:?}");
}
