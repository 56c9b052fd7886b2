//! `lonas bench`: what it prints for scripts, what it saves, what it refuses. No test looks at how fast anything is.

use super::process::lonas;
use crate::tiny::{NAME, OTHER, Tiny};
use serde_json::Value;
use std::process::Output;

/// Short, and on one thread.
const QUICK: [&str; 8] = ["--threads", "1", "--prompt", "20", "--output", "4", "--step-tokens", "8"];

fn bench(tiny: &Tiny, models: &[&str], more: &[&str]) -> Output {
    let mut command = lonas(&["bench"]);
    models.iter().for_each(|name| _ = command.arg(tiny.model(name)));
    command.args(QUICK).args(more).output().unwrap()
}

fn lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::str::from_utf8(&output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn json_has_a_line_for_every_figure_of_every_folder() {
    let tiny = Tiny::write();
    let more = ["--json", "--rounds", "2", "--streams", "1,3", "--context", "5,30", "--without-adapter"];
    let output = bench(&tiny, &[NAME, OTHER], &more);
    let lines = lines(&output);
    for line in &lines {
        assert_eq!((&line["device"], &line["threads"]), (&"cpu".into(), &1.into()), "{line}");
        assert!(line["machine"].is_string() && line["dtype"].is_string(), "{line}");
    }
    let of = |test: &str| lines.iter().filter(|l| l["test"] == test).collect::<Vec<_>>();
    // Two folders of three sub-networks, with and without adapters; 1, 3 and the mix's 8 streams at two contexts.
    assert_eq!(of("prefill").len(), 12);
    assert_eq!(of("decode").len(), 12 * 3 * 2);
    assert_eq!(of("mixed").len(), 2);
    for line in [of("prefill"), of("decode"), of("mixed")].concat() {
        let positive = |value: &Value| value.as_f64().is_some_and(|v| v > 0.0 && v.is_finite());
        let rate = &line["tokens_per_second"];
        assert!(["median", "min", "max"].iter().all(|k| positive(&rate[k])), "{line}");
        for field in ["seconds_per_step", "traffic_bytes", "multiply_adds", "bandwidth", "share_of_bound"] {
            assert!(positive(&line[field]), "{field}: {line}");
        }
        assert!(line["bound"] == "memory" || line["bound"] == "arithmetic", "{line}");
        assert_eq!((&line["prompt"], &line["rounds"]), (&20.into(), &2.into()));
        let compared = line["adapter"] == true && line["test"] != "mixed";
        assert_eq!(line["adapter_share"].is_number(), compared, "{line}");
        assert_eq!(line["over_uniform"].is_number(), line["test"] == "mixed", "{line}");
    }
    assert_eq!(of("prefill")[0]["steps"], 3, "20 tokens in steps of 8");
    let first = of("decode")[0];
    assert_eq!((&first["model"], &first["subnetwork"]), (&NAME.into(), &"maximal".into()));
    assert_eq!((&first["context"], &first["streams"], &first["steps"]), (&5.into(), &1.into(), &4.into()));
    for (test, fields) in [
        ("load", &["seconds", "resident_bytes", "weight_bytes"][..]),
        ("register", &["seconds", "bytes"]),
        ("limits", &["read_bytes_per_second", "f32_flops", "bf16_flops", "int8_ops"]),
        ("noise", &["foreign_share", "stolen_share"]),
    ] {
        assert_eq!(of(test).len(), 1, "{test}");
        assert!(fields.iter().all(|f| of(test)[0].get(f).is_some()), "{}", of(test)[0]);
    }
}

#[test]
fn one_sub_network_is_measured_alone() {
    let tiny = Tiny::write();
    let more = ["--json", "--rounds", "1", "--streams", "2", "--subnetwork", "minimal"];
    let rates = lines(&bench(&tiny, &[NAME], &more)).into_iter().filter(|l| l["streams"].is_number());
    let rates = rates.map(|l| (l["test"].clone(), l["subnetwork"].clone(), l["streams"].clone()));
    let minimal = |test: &str, streams: u32| (test.into(), "minimal".into(), streams.into());
    assert_eq!(rates.collect::<Vec<(Value, Value, Value)>>(), [minimal("prefill", 1), minimal("decode", 2)]);
}

#[test]
fn save_puts_latencies_and_pictures_into_every_folder() {
    let tiny = Tiny::write();
    let more = ["--save", "--rounds", "1", "--streams", "1", "--machine", "here"];
    let output = bench(&tiny, &[NAME, OTHER], &more);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    for said in ["tiny-other:minimal", "all mixed", "share of the bound", "one more sub-network", "here; cpu"]
    {
        assert!(text.contains(said), "{said}: {text}");
    }
    for name in [NAME, OTHER] {
        let read = |file: &str| std::fs::read_to_string(tiny.model(name).join(file)).unwrap();
        let catalog: Value = serde_json::from_str(&read("catalog.json")).unwrap();
        for entry in catalog.as_array().unwrap() {
            let latency = &entry["latency"]["here"];
            assert!(latency["prefill_seconds_per_token"].as_f64().is_some_and(|s| s > 0.0), "{entry}");
            assert!(latency["decode_seconds_per_token"].as_f64().is_some_and(|s| s > 0.0), "{entry}");
        }
        assert!(read("accuracy-latency.svg").ends_with("</svg>\n"));
        assert!(read("throughput.svg").contains("minimal"));
    }
}

#[test]
fn what_cannot_be_measured_is_refused_by_name() {
    let tiny = Tiny::write();
    let cases: [(i32, &[&str], &str); 8] = [
        (2, &["--rounds", "0"], "--rounds"),
        (2, &["--streams", "1,0"], "--streams"),
        (2, &["--context", "many"], "--context"),
        (2, &["--prompt", "-1"], "-1"),
        (1, &["--context", "125"], "128 positions"),
        (1, &["--context", "18446744073709551615"], "128 positions"),
        (1, &["--subnetwork", "huge"], "huge: the catalog has maximal, heuristic, minimal"),
        (1, &["--streams", "2", "--save"], "--streams must have 1"),
    ];
    for (code, more, named) in cases {
        let output = lonas(&["bench"]).arg(tiny.model(NAME)).args(more).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{more:?}: {said}");
        assert!(said.contains(named), "{more:?}: {said}");
    }
}
