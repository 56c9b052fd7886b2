//! Every reader of files that others have written, each as a function of one file's bytes; what lies beside it is whole.
//!
//! `fuzz_targets` feeds them with libFuzzer, tests/hostile.rs with mutations of the seeds, a fixed number of them. A new reader
//! is a line in [`READERS`].

use lonas::artifact::{
    Base, ElasticFile, ModelFolder, TokenizerSource, read_adapter, read_adapter_config,
    read_published_adapter,
};
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::export::vocabulary_parts;
use lonas::model::{Adapters, Orders, executor, model_shape};
use lonas::text::Tokenizer;
use std::path::{Path, PathBuf};

/// One reader.
#[derive(Clone, Copy)]
pub struct Reader {
    pub name: &'static str,
    /// A folder of tests/golden, which is read whole.
    folder: &'static str,
    /// The file in it that is fed.
    pub file: &'static str,
    /// Its first bytes, which decide how the rest is read; the rest is numbers, where nothing can go wrong.
    pub header: usize,
    read: fn(&Path, &str) -> Result<(), String>,
}

const fn reader(
    name: &'static str,
    folder: &'static str,
    file: &'static str,
    header: usize,
    read: fn(&Path, &str) -> Result<(), String>,
) -> Reader {
    Reader { name, folder, file, header, read }
}

pub const READERS: [Reader; 19] = [
    // Names and vocabulary are about 9 kB.
    reader("gguf", "gguf", "plain.gguf", 9000, file),
    reader("gguf-k", "gguf", "k.gguf", 9000, file),
    reader("tensors", "tiny-bias-headdim/base", "model.safetensors", 3000, folder),
    reader("config", "tiny-bias-headdim/base", "config.json", usize::MAX, folder),
    reader("bloom-tensors", "tiny-bloom/base", "model.safetensors", 3000, folder),
    reader("index", "tiny-untied-bf16/base", "model.safetensors.index.json", usize::MAX, folder),
    // The groups of inputs lie behind the header, so all of it is fed.
    reader("gptq-tensors", "gptq/asym-64-act", "model.safetensors", usize::MAX, folder),
    reader("gptq-header", "gptq/asym-64-act", "model.safetensors", 3000, folder),
    reader("gptq-config", "gptq/sym-8-bits", "config.json", usize::MAX, folder),
    reader("awq-header", "gptq/awq", "model.safetensors", 3000, folder),
    reader("adapter-tensors", "tiny-bias-headdim/supernet", "adapter_model.safetensors", 3000, adapter),
    reader("adapter-config", "tiny-bias-headdim/supernet", "adapter_config.json", usize::MAX, adapter),
    // The archive's directory stands at its end.
    reader("adapter-torch", "adapters/cut", "adapter_model.bin", usize::MAX, published),
    reader("nncf", "elastic-files", "nncf.json", usize::MAX, elastic),
    reader("sqft", "elastic-files", "sqft.json", usize::MAX, elastic),
    reader("supernet", "tiny-tied-ordered/supernet", "supernet.json", usize::MAX, model_folder),
    reader("catalog", "tiny-tied-ordered/supernet", "catalog.json", usize::MAX, model_folder),
    reader("tokenizer", "tokenizer", "byte-level.json", usize::MAX, tokenizer),
    reader("tokenizer-fallback", "tokenizer", "byte-fallback.json", usize::MAX, tokenizer),
];

/// A copy of a reader's folder.
pub struct Seed {
    reader: Reader,
    folder: tempfile::TempDir,
}

impl Seed {
    pub fn new(reader: Reader) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for entry in std::fs::read_dir(golden().join(reader.folder)).expect("tests/golden") {
            let from = entry.expect("tests/golden").path();
            std::fs::copy(&from, folder.path().join(from.file_name().expect("a file"))).expect("a copy");
        }
        if reader.file == "catalog.json" {
            write_catalog(folder.path()).expect("a catalog");
        }
        Self { reader, folder }
    }

    /// The file as it should be.
    pub fn whole(&self) -> Vec<u8> {
        std::fs::read(self.path()).expect("the seed")
    }

    /// Reads all that the file decides, with these bytes for the file.
    ///
    /// # Errors
    /// What the reader says to it.
    pub fn read(&self, bytes: &[u8]) -> Result<(), String> {
        std::fs::write(self.path(), bytes).expect("room for a file");
        (self.reader.read)(self.folder.path(), self.reader.file)
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(self.reader.file)
    }
}

/// From the program's own folder or from `fuzz`.
fn golden() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let places = [here.join("tests/golden"), here.join("../tests/golden")];
    places.into_iter().find(|place| place.exists()).expect("tests/golden")
}

fn said<T>(result: Result<T, impl std::fmt::Display>) -> Result<T, String> {
    result.map_err(|e| e.to_string())
}

fn folder(path: &Path, _: &str) -> Result<(), String> {
    base(path)
}

fn file(path: &Path, file: &str) -> Result<(), String> {
    base(&path.join(file))
}

/// Opens and loads a base, every tensor of it.
fn base(path: &Path) -> Result<(), String> {
    let base = said(Base::open(path))?;
    let (cpu, none) = (Cpu::new(Dtype::Auto, 1), Adapters::Beside(Vec::new()));
    said(executor(cpu, &base, none, &Orders::default(), (1, 1)))?;
    let TokenizerSource::Gguf(vocabulary) = base.tokenizer else { return Ok(()) };
    let parts = vocabulary_parts(vocabulary);
    said(said(Tokenizer::from_vocabulary(parts))?.encode("the cat <|end|> é", true)).map(|_| ())
}

fn adapter(path: &Path, _: &str) -> Result<(), String> {
    said(read_adapter(path)).map(|_| ())
}

fn published(path: &Path, _: &str) -> Result<(), String> {
    said(read_published_adapter(path)).map(|_| ())
}

/// With the model and the adapter that the file was written for.
fn elastic(path: &Path, file: &str) -> Result<(), String> {
    let base = said(Base::open(&golden().join("tiny-tied/base")))?;
    let adapter = said(read_adapter_config(&golden().join("tiny-tied/supernet")))?;
    let shape = model_shape(&base.config, Some(&adapter));
    said(said(ElasticFile::read(&path.join(file)))?.search_space(&shape, adapter.rank)).map(|_| ())
}

fn model_folder(path: &Path, _: &str) -> Result<(), String> {
    let base = said(Base::open(&golden().join("tiny-tied/base")))?;
    let folder = said(ModelFolder::open(path))?;
    let shape = model_shape(&base.config, Some(&folder.adapter_config));
    let space = said(folder.search_space(&shape))?;
    said(folder.catalog(&shape, &space)).map(|_| ())
}

fn write_catalog(path: &Path) -> Result<(), String> {
    let base = said(Base::open(&golden().join("tiny-tied/base")))?;
    let folder = said(ModelFolder::open(path))?;
    let shape = model_shape(&base.config, Some(&folder.adapter_config));
    let space = said(folder.search_space(&shape))?;
    said(folder.write_catalog(&said(folder.catalog(&shape, &space))?))
}

fn tokenizer(path: &Path, file: &str) -> Result<(), String> {
    let tokenizer = said(Tokenizer::from_hugging_face(&path.join(file), Some("<s>"), Some("</s>")))?;
    let ids = said(tokenizer.encode("the cat <s> é🙂", true))?;
    tokenizer.decode(&ids, false);
    said(tokenizer.decode_whole(&ids, false)).map(|_| ())
}
