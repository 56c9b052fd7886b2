//! What of this room needs no golden file: digests, files that appear whole, where a base is looked for. Files as a user
//! meets them are tested under `tests`.

use super::encode::append;
use super::whole::WholeFile;
use super::{
    BaseSource, NumberFormat, OutTensor, Replaceable, WholeFolder, check_apart, check_written, locate,
    sha256_of_file, write_whole,
};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use std::path::PathBuf;

/// Of `abc`, from FIPS 180-2.
const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

#[test]
fn a_digest_is_that_of_the_standards_example() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("abc");
    write_whole(&file, b"abc").unwrap();
    assert_eq!(sha256_of_file(&file).unwrap(), ABC);
}

#[test]
fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a");
    write_whole(&file, b"old and longer").unwrap();
    write_whole(&file, b"new").unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), b"new");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    let error = write_whole(&folder.path().join("missing/a"), b"x").unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");
}

#[test]
fn a_folder_that_is_not_finished_was_never_there() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("a");
    let all =
        || std::fs::read_dir(parent.path()).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
    let ours: Replaceable =
        |folder| check_written(folder, &["written by", "us"], |path| !path.ends_with("y"));
    let start = |replace: bool| WholeFolder::create(&path, replace.then_some(ours));
    let folder = start(false).unwrap();
    write_whole(&folder.path().join("x"), b"new").unwrap();
    assert!(!path.exists());
    drop(folder);
    assert_eq!(all(), [""; 0]);
    let folder = start(false).unwrap();
    write_whole(&folder.path().join("x"), b"new").unwrap();
    folder.finish().unwrap();
    assert_eq!(all(), ["a"]);
    assert!(start(false).unwrap_err().to_string().contains("something already"));
    // Nobody else's files are replaced: not without a card that says whose they are, nor beside one.
    let refused = |named: &str| {
        let error = start(true).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    };
    refused("no model card (README.md)");
    write_whole(&path.join("README.md"), b"written by them\nus").unwrap();
    refused("no model card (README.md)");
    write_whole(&path.join("README.md"), b"This was written by us.").unwrap();
    write_whole(&path.join("y"), b"").unwrap();
    refused("`y`");
    std::fs::remove_file(path.join("y")).unwrap();
    let folder = start(true).unwrap();
    write_whole(&path.join("y"), b"").unwrap();
    assert!(folder.finish().unwrap_err().to_string().contains("`y`"), "what came meanwhile stays, too");
    std::fs::remove_file(path.join("y")).unwrap();
    // What is replaced stays until the new one is whole.
    let folder = start(true).unwrap();
    assert_eq!(std::fs::read(path.join("x")).unwrap(), b"new");
    folder.finish().unwrap();
    assert_eq!((all().len(), std::fs::read_dir(&path).unwrap().count()), (1, 0));
}

#[test]
fn what_is_written_lies_apart_from_what_is_read() {
    let parent = tempfile::tempdir().unwrap();
    let at = |name: &str| parent.path().join(name);
    for folder in ["base", "base/inner", "other"] {
        std::fs::create_dir(at(folder)).unwrap();
    }
    write_whole(&at("base/w.gguf"), b"").unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(at("base"), at("link")).unwrap();
    let refused = |out: &str, source: &str| {
        check_apart(&at(out), &[("the base", &at(source))]).err().map(|error| error.to_string())
    };
    for (out, source, named) in [
        ("base", "base", "it is the base"),
        ("base/w.gguf", "base/w.gguf", "it is the base"),
        ("base/new", "base", "it lies in the base"),
        ("base/no/such", "base", "it lies in the base"),
        ("other/../base/new", "base", "it lies in the base"),
        ("base", "base/w.gguf", "it holds the base"),
        ("base/inner/../", "base/w.gguf", "it holds the base"),
        #[cfg(unix)]
        ("link", "base", "it is the base"),
        #[cfg(unix)]
        ("link/new", "base/../base", "it lies in the base"),
    ] {
        let error = refused(out, source).unwrap_or_default();
        assert!(error.contains(named) && error.contains(source), "{out} {source}: {error}");
    }
    for (out, source) in
        [("base/w2.gguf", "base/w.gguf"), ("based", "base"), ("new", "base"), ("no/such", "base")]
    {
        assert_eq!(refused(out, source), None, "{out} {source}");
    }
}

/// The same rounding as ggml's, which candle follows too.
#[test]
fn blocks_of_bytes_are_those_of_candle() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let values = (0..320).map(|i| ((i * 7919 % 641) as f32 - 320.0) * 1.7e-3).collect::<Vec<_>>();
    let values = [vec![0.0; 32], values].concat();
    let tensor = OutTensor { name: "t".into(), shape: vec![11, 32], format: NumberFormat::Q8_0 };
    let mut file = WholeFile::create(&path).unwrap();
    append(&mut file, &path, &tensor, &values).unwrap();
    file.finish().unwrap();
    let theirs = Tensor::from_vec(values, (11, 32), &Device::Cpu).unwrap();
    let theirs = QTensor::quantize(&theirs, GgmlDType::Q8_0).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), theirs.data().unwrap().as_ref());
}

#[test]
fn a_base_at_a_path_must_have_its_digest() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("base.gguf");
    write_whole(&file, b"abc").unwrap();
    let source = BaseSource::Path(file.clone());
    assert_eq!(locate(&source, None, folder.path()).unwrap(), file);
    assert_eq!(locate(&source, Some(&ABC.to_uppercase()), folder.path()).unwrap(), file);
    let error = locate(&source, Some(&"0".repeat(64)), folder.path()).unwrap_err().to_string();
    assert!(error.contains("base.gguf") && error.contains(ABC), "{error}");
    let error = locate(&BaseSource::Path("no/such".into()), None, folder.path()).unwrap_err().to_string();
    assert!(error.contains("no/such"), "{error}");
}

fn pypi(package: &str, version: &str, file: &str) -> BaseSource {
    BaseSource::Pypi { package: package.into(), version: version.into(), file: file.into() }
}

#[test]
fn a_base_that_was_fetched_before_is_checked_and_not_fetched_again() {
    let cache = tempfile::tempdir().unwrap();
    let place = cache.path().join("some-base-1.0");
    std::fs::create_dir(&place).unwrap();
    write_whole(&place.join("m.gguf"), b"abc").unwrap();
    let source = pypi("some-base", "1.0", "in/the/wheel/m.gguf");
    assert_eq!(locate(&source, Some(ABC), cache.path()).unwrap(), place.join("m.gguf"));
    let error = locate(&source, Some(&"0".repeat(64)), cache.path()).unwrap_err().to_string();
    assert!(error.contains("m.gguf") && error.contains(ABC), "{error}");
}

/// A supernet.json comes from anywhere; its words must be no options of pip and lead out of no folder.
#[test]
fn a_package_that_is_no_package_is_refused_before_anything_is_run() {
    let cache = tempfile::tempdir().unwrap();
    for (package, version, file) in [
        ("", "1", "m.gguf"),
        ("-r", "1", "m.gguf"),
        ("--pre", "1", "m.gguf"),
        ("a/b", "1", "m.gguf"),
        ("..", "1", "m.gguf"),
        ("a", "", "m.gguf"),
        ("a", "1 --pre", "m.gguf"),
        ("a", "../1", "m.gguf"),
        ("a", "1", ""),
        ("a", "1", ".."),
        ("a", "1", "../../secret"),
        ("a", "1", "/etc/hostname"),
        ("a", "1", "a/../../secret"),
    ] {
        let error = locate(&pypi(package, version, file), None, cache.path()).unwrap_err().to_string();
        assert!(error.contains("not a package name, a version and a file"), "{error}");
        assert!(error.contains(&format!("{file:?} of {package:?} {version:?}")), "{error}");
    }
    let leftovers = std::fs::read_dir(cache.path()).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
    assert_eq!(leftovers, Vec::<PathBuf>::new());
}
