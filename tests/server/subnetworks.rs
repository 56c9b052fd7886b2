//! Sub-networks that are registered and removed while the server runs.

use super::app::{Answer, App, COMPLETIONS, Options};
use super::held::Then;
use crate::golden::Supernet;
use crate::tiny::{NAME, OTHER, Tiny, X};
use axum::body::Body;
use axum::http::{Request, header};
use lonas::artifact::CatalogLine;
use lonas::supernet::Catalog;
use serde_json::{Value, json};

const ALL: &str = "/v1/subnetworks";
const KEY: &str = "admin";

fn open_to_admins() -> Options {
    Options { admin_keys: vec![KEY.into()], ..Options::default() }
}

async fn ask(app: &App, key: &str, method: &str, path: &str, body: impl Into<Body>) -> Answer {
    let request =
        Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
    let request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
    app.send(request.body(body.into()).unwrap()).await
}

async fn register(app: &App, body: &Value) -> Answer {
    ask(app, KEY, "POST", ALL, body.to_string()).await
}

async fn remove(app: &App, id: &str) -> Answer {
    ask(app, KEY, "DELETE", &format!("{ALL}/{id}"), "").await
}

/// The choices of a sub-network that is none of the three: each group at `(group + shift) % count`.
fn choices(app: &App, shift: usize) -> Vec<usize> {
    chosen(&app.tiny, shift)
}

fn chosen(tiny: &Tiny, shift: usize) -> Vec<usize> {
    let net = Supernet::of(&tiny.base(), &tiny.model(NAME));
    net.space.pick(|group, count| (group + shift) % count).choices().to_vec()
}

fn named(app: &App, name: &str, shift: usize) -> Value {
    json!({"model": NAME, "name": name, "choices": choices(app, shift)})
}

/// What a sub-network says, to the last bit.
async fn says(app: &App, sub_network: &str) -> Value {
    let body = question(sub_network);
    app.complete(body).await["choices"].clone()
}

fn question(sub_network: &str) -> Value {
    json!({
        "model": format!("{NAME}:{sub_network}"), "prompt": "the end of the list is", "max_tokens": 30,
        "temperature": 0, "ignore_eos": true, "logprobs": 3,
    })
}

/// The catalog as it lies on disk.
fn on_disk(app: &App) -> Catalog {
    let net = Supernet::of(&app.tiny.base(), &app.tiny.model(NAME));
    net.folder.catalog(&net.shape, &net.space).unwrap()
}

#[tokio::test]
async fn a_registered_sub_network_answers_at_once_as_one_that_the_catalog_had() {
    let with_mine = |tiny: &Tiny| {
        let line = json!([{"name": "mine", "choices": chosen(tiny, 1)}]).to_string();
        std::fs::write(tiny.model(NAME).join("catalog.json"), line).unwrap();
    };
    let from_the_start = App::with(Options { prepare: with_mine, ..Options::default() });
    let app = App::with(open_to_admins());
    app.post(COMPLETIONS, &question("mine")).await.expect(404);
    let made = register(&app, &named(&app, "mine", 1)).await.expect(201);
    let listed = from_the_start.get(&format!("{ALL}/{NAME}:mine")).await.expect(200);
    assert_eq!(made, listed, "and it costs the same");
    assert_eq!(says(&app, "mine").await, says(&from_the_start, "mine").await);
    assert_ne!(says(&app, "mine").await, says(&app, "maximal").await, "it is a sub-network of its own");

    let card = app.get(&format!("/v1/models/{NAME}:mine")).await.expect(200);
    assert_eq!((&card["elastic"]["subnetwork"], &card["parent"]), (&json!("mine"), &json!(NAME)));
    assert_eq!(app.get("/v1/models").await.expect(200)["data"].as_array().unwrap().len(), 9);
    let all = app.get(ALL).await.expect(200);
    let ids = all["data"].as_array().unwrap().iter().map(|c| c["id"].as_str().unwrap()).collect::<Vec<_>>();
    assert!(ids.len() == 7 && ids.contains(&"tiny-tied:mine"), "{ids:?}");
}

#[tokio::test]
async fn a_registration_while_others_generate_changes_nothing_for_them() {
    let app = App::with(open_to_admins());
    let alone = says(&app, "maximal").await;
    app.gate.after(3, Then::Wait);
    let running = app.start(COMPLETIONS, &question("maximal"));
    app.until("it runs", |s| s.load().0 == 1.0).await;
    register(&app, &named(&app, "mine", 1)).await.expect(201);
    let new = app.start(COMPLETIONS, &question("mine"));
    app.until("both are in", |s| s.accepted() == 3.0).await;
    app.gate.open();
    assert_eq!(running.await.unwrap().expect(200)["choices"], alone);
    let mixed = new.await.unwrap().expect(200)["choices"].clone();
    assert_eq!(mixed, says(&app, "mine").await);
}

#[tokio::test]
async fn what_runs_on_a_removed_sub_network_ends_and_its_name_may_mean_another_one() {
    let app = App::with(open_to_admins());
    for (name, shift) in [("mine", 1), ("one", 1), ("two", 2)] {
        register(&app, &named(&app, name, shift)).await.expect(201);
    }
    let (one, two) = (says(&app, "one").await, says(&app, "two").await);
    assert_ne!(one, two);
    app.gate.after(3, Then::Wait);
    let old = app.start(COMPLETIONS, &question("mine"));
    // Not what is running: that is told after a step, and may still be the one before.
    app.until("it is taken in", |s| s.accepted() == 3.0).await;
    let gone = remove(&app, "tiny-tied:mine").await.expect(200);
    assert_eq!(gone, json!({"id": "tiny-tied:mine", "object": "subnetwork", "deleted": true}));
    app.post(COMPLETIONS, &question("mine")).await.expect(404);
    app.get("/v1/models/tiny-tied:mine").await.expect(404);
    remove(&app, "tiny-tied:mine").await.expect(404);
    register(&app, &named(&app, "mine", 2)).await.expect(201);
    let new = app.start(COMPLETIONS, &question("mine"));
    app.until("both are in", |s| s.accepted() == 4.0).await;
    let label = [("subnetwork", "tiny-tied:mine")];
    app.until("both count under the name", |s| {
        s.sum("lonas_requests_running", &label) + s.sum("lonas_requests_waiting", &label) >= 1.0
    })
    .await;
    app.gate.open();
    assert_eq!(old.await.unwrap().expect(200)["choices"], one, "what it began with");
    assert_eq!(new.await.unwrap().expect(200)["choices"], two, "what the name means now");
    app.until_idle().await;
    assert_eq!(app.scrape().await.sum("lonas_requests_total", &label), 2.0);
}

#[tokio::test]
async fn the_same_again_is_taken_and_another_one_is_not() {
    let app = App::with(open_to_admins());
    let mut body = named(&app, "mine", 1);
    let made = register(&app, &body).await.expect(201);
    assert_eq!(register(&app, &body).await.expect(200), made);
    // All of it may be said, as the list has it.
    for field in ["parameters", "macs"] {
        body[field] = made[field].clone();
    }
    body["scores"] = json!({"arc": 0.5});
    assert_eq!(register(&app, &body).await.expect(200)["scores"], json!({"arc": 0.5}));
    body["scores"] = json!({"obqa": 0.25});
    assert_eq!(register(&app, &body).await.expect(200)["scores"], json!({"arc": 0.5, "obqa": 0.25}));
    let maximal = app.get(&format!("{ALL}/{NAME}:maximal")).await.expect(200)["choices"].clone();
    let same = json!({"model": NAME, "name": "maximal", "choices": maximal});
    register(&app, &same).await.expect(200);

    let other = register(&app, &named(&app, "mine", 2)).await;
    assert_eq!((other.status, &other.error()["param"]), (409, &json!("name")));
    for name in ["maximal", "heuristic", "minimal"] {
        let taken = register(&app, &named(&app, name, 1)).await;
        assert_eq!((taken.status, &taken.error()["code"]), (409, &json!("name_taken")));
        let kept = remove(&app, &format!("{NAME}:{name}")).await;
        assert_eq!((kept.status, &kept.error()["code"]), (409, &json!("fixed_subnetwork")));
    }
    // The other super-adapter has names of its own.
    let mut elsewhere = named(&app, "mine", 2);
    elsewhere["model"] = json!(OTHER);
    register(&app, &elsewhere).await.expect(201);
    remove(&app, "tiny-other:mine").await.expect(200);
    says(&app, "mine").await;
}

#[tokio::test]
async fn what_is_no_sub_network_is_refused_by_field() {
    let app = App::with(open_to_admins());
    let good = named(&app, "mine", 1);
    let mut outside = choices(&app, 1);
    outside[3] += 1;
    let short = &choices(&app, 1)[1..];
    let cases = [
        ("name", json!(null), "name", ""),
        ("name", json!(""), "name", "1 to 64 characters"),
        ("name", json!("a:b"), "name", "A-Z a-z 0-9"),
        ("name", json!("."), "name", "A-Z a-z 0-9"),
        ("name", json!(".."), "name", "A-Z a-z 0-9"),
        ("name", json!("x".repeat(65)), "name", "1 to 64"),
        ("choices", json!(outside), "choices[3]", "is not one of the choices ["),
        ("choices", json!(short), "choices", "one for each group, got"),
        ("choices", json!([-1]), "choices[0]", ""),
        ("choices", json!("maximal"), "choices", ""),
        ("parameters", json!(1), "parameters", "expected"),
        ("macs", json!(1), "macs", "expected"),
        ("scores", json!({"arc": "good"}), "scores.arc", ""),
        ("scores", json!({"arc": null}), "scores.arc", ""),
        ("scores", json!({"arc": 64.1}), "scores.arc", "from -1 to 1"),
        ("scores", json!({"arc": 1e308}), "scores.arc", "from -1 to 1"),
        (
            "latency",
            json!({"here": {"prefill_seconds_per_token": -1.0, "decode_seconds_per_token": 1.0}}),
            "latency.here",
            "-1",
        ),
        ("latency", json!({"here": {}}), "latency.here", "missing field"),
        ("persist", json!("yes"), "persist", ""),
        ("colour", json!("red"), "colour", "unknown field"),
        ("model", json!(null), "model", "`tiny-tied`, `tiny-other`"),
    ];
    for (field, value, param, said) in cases {
        let mut body = good.clone();
        body[field] = value.clone();
        let answer = register(&app, &body).await;
        assert_eq!(answer.status, 400, "{field}: {value}: {}", answer.body);
        let error = answer.error();
        assert_eq!(error["param"], json!(param), "{field}: {value}: {error}");
        assert!(error["message"].as_str().unwrap().contains(said), "{field}: {value}: {error}");
    }
    let mut unknown = good.clone();
    unknown["model"] = json!("nobody");
    register(&app, &unknown).await.expect(404);
    ask(&app, KEY, "POST", ALL, "{").await.expect(400);
    let large = json!({"model": NAME, "name": "mine", "choices": vec![1; 40_000]}).to_string();
    ask(&app, KEY, "POST", ALL, large).await.expect(413);
    for (path, status) in [
        ("mine", 400),
        ("tiny-tied:mine", 404),
        ("nobody:mine", 404),
        ("tiny-tied:", 404),
        (":", 404),
        ("tiny-tied:maximal?persist=perhaps", 400),
        ("tiny-tied:maximal?colour=red", 400),
        ("%ff", 400),
    ] {
        let answer = remove(&app, path).await;
        assert_eq!((answer.status, answer.error()["message"].is_string()), (status, true), "{path}");
    }
    assert_eq!(app.get(ALL).await.expect(200)["data"].as_array().unwrap().len(), 6, "nothing has changed");
}

#[tokio::test]
async fn only_an_admin_key_changes_what_is_served() {
    let both = || Options { api_keys: vec!["user".into()], ..open_to_admins() };
    let app = App::with(both());
    let body = named(&app, "mine", 1).to_string();
    for key in ["", "user", "Admin", "admin2"] {
        let refused = ask(&app, key, "POST", ALL, body.clone()).await;
        assert_eq!((refused.status, &refused.error()["code"]), (401, &json!("invalid_api_key")), "{key}");
        assert_eq!(ask(&app, key, "DELETE", &format!("{ALL}/{NAME}:mine"), "").await.status, 401, "{key}");
    }
    assert_eq!(app.scrape_with("user").await.sum("lonas_rejected_total", &[("reason", "auth")]), 8.0);
    ask(&app, "admin", "POST", ALL, body.clone()).await.expect(201);
    ask(&app, "user", "GET", ALL, "").await.expect(200);
    for path in [ALL, "/v1/models", "/metrics"] {
        assert_eq!(ask(&app, "admin", "GET", path, "").await.status, 401, "{path} is for those who ask");
    }
    ask(&app, "admin", "POST", COMPLETIONS, question("mine").to_string()).await.expect(401);
    ask(&app, "user", "POST", COMPLETIONS, question("mine").to_string()).await.expect(200);
    ask(&app, "admin", "PUT", ALL, body.clone()).await.expect(405);

    let closed = App::new();
    let refused = ask(&closed, "", "POST", ALL, body).await;
    assert_eq!((refused.status, &refused.error()["code"]), (403, &json!("admin_disabled")));
    assert!(refused.error()["message"].as_str().unwrap().contains("--admin-key"));
    remove(&closed, "tiny-tied:maximal").await.expect(403);
    closed.get(ALL).await.expect(200);
}

#[tokio::test]
async fn there_is_a_most_of_them() {
    let app = App::with(Options { max_sub_networks: 7, ..open_to_admins() });
    register(&app, &named(&app, "one", 1)).await.expect(201);
    let full = register(&app, &named(&app, "two", 2)).await;
    assert_eq!((full.status, &full.error()["code"]), (409, &json!("too_many_subnetworks")));
    register(&app, &named(&app, "one", 1)).await.expect(200);
    remove(&app, "tiny-tied:one").await.expect(200);
    register(&app, &named(&app, "two", 2)).await.expect(201);
}

#[tokio::test]
async fn the_default_sub_network_stays() {
    let by_default = |models: &mut [lonas::server::ServedModel]| {
        let minimal = models[0].get("minimal").unwrap().clone();
        let mut mine = (*minimal).clone();
        mine.entry.name = "mine".into();
        mine.selection.subnetwork = 99;
        models[0].sub_networks.push(std::sync::Arc::new(mine));
        models[0].default = "mine".into();
    };
    let app = App::with(Options { models: by_default, ..open_to_admins() });
    let kept = remove(&app, "tiny-tied:mine").await;
    assert_eq!((kept.status, &kept.error()["code"]), (409, &json!("default_subnetwork")));
    // Its id was the largest; a new one takes none that there is.
    register(&app, &named(&app, "two", 2)).await.expect(201);
    let two = says(&app, "two").await;
    assert_ne!(two, says(&app, "mine").await);
}

#[tokio::test]
async fn it_outlives_the_server_only_if_that_is_asked_for() {
    let app = App::with(open_to_admins());
    let catalog = app.tiny.model(NAME).join("catalog.json");
    let before = std::fs::read(&catalog).ok();
    register(&app, &named(&app, "passing", 2)).await.expect(201);
    assert_eq!(std::fs::read(&catalog).ok(), before, "not a byte");
    let mut lasting = named(&app, "lasting", 1);
    lasting["persist"] = json!(true);
    lasting["scores"] = json!({"arc": 0.5});
    let made = register(&app, &lasting).await.expect(201);
    let found = CatalogLine::of(on_disk(&app).get("lasting").unwrap());
    let found = serde_json::to_value(found).unwrap();
    for field in ["name", "choices", "parameters", "macs", "scores", "latency"] {
        assert_eq!(found[field], made[field], "{field}");
    }
    assert_eq!(on_disk(&app).get("passing"), None);
    // One that was registered without may be written later.
    let mut later = named(&app, "passing", 2);
    later["persist"] = json!(true);
    register(&app, &later).await.expect(200);
    assert_eq!(on_disk(&app).entries().len(), 5);
    remove(&app, "tiny-tied:passing").await.expect(200);
    assert!(on_disk(&app).get("passing").is_some());
    remove(&app, "tiny-tied:lasting?persist=true").await.expect(200);
    assert_eq!(on_disk(&app).get("lasting"), None);

    // The file may have come to hold another one of that name.
    let mut other = named(&app, "passing", 3);
    other["persist"] = json!(true);
    assert_eq!(register(&app, &other).await.error()["code"], json!("name_taken"));
    // As where the folder is read-only, but also for root.
    std::fs::remove_dir_all(app.tiny.model(NAME)).unwrap();
    let unwritten = register(&app, &lasting_again(&lasting)).await;
    assert_eq!((unwritten.status, &unwritten.error()["code"]), (409, &json!("catalog_not_written")));
    let message = unwritten.error()["message"].as_str().unwrap().to_string();
    assert!(message.contains("(entity not found)") && !message.contains('/'), "{message}");
    app.post(COMPLETIONS, &question("again")).await.expect(404);
}

fn lasting_again(lasting: &Value) -> Value {
    let mut again = lasting.clone();
    again["name"] = json!("again");
    again
}

#[tokio::test]
async fn bounds_know_a_registered_sub_network_by_its_figures() {
    let app = App::with(Options { machine: Some("here".into()), ..open_to_admins() });
    let bounded = |bounds: Value| json!({"model": NAME, "elastic": bounds, "prompt": "one", "max_tokens": 1});
    let (accurate, fast) = (json!({"min_accuracy": 0.5}), json!({"max_tpot_ms": 20}));
    app.post(COMPLETIONS, &bounded(accurate.clone())).await.expect(400);
    let mut body = named(&app, "mine", 1);
    register(&app, &body).await.expect(201);
    app.post(COMPLETIONS, &bounded(accurate.clone())).await.expect(400);
    body["scores"] = json!({"arc": 0.6});
    body["latency"] = json!({"here": {"prefill_seconds_per_token": 0.001, "decode_seconds_per_token": 0.01}});
    register(&app, &body).await.expect(200);
    for (bounds, reason) in [(accurate, "accuracy"), (fast, "latency")] {
        let answer = app.complete(bounded(bounds)).await;
        assert_eq!(
            (&answer["elastic"]["served"], &answer["elastic"]["reason"]),
            (&json!("mine"), &json!(reason))
        );
    }
}

#[tokio::test]
async fn metrics_name_what_is_registered_and_no_more_than_a_bounded_number() {
    let app = App::with(open_to_admins());
    let has = |text: &str, series: &str| text.lines().any(|line| line == series);
    register(&app, &named(&app, "mine", 1)).await.expect(201);
    let generated = "lonas_generated_tokens_total{subnetwork=\"tiny-tied:mine\"}";
    let info = "lonas_subnetwork_info{model=\"tiny-tied\",name=\"mine\",subnetwork=\"tiny-tied:mine\"} 1";
    let text = app.scrape().await.0;
    assert!(has(&text, &format!("{generated} 0")) && has(&text, info), "{text}");
    says(&app, "mine").await;
    remove(&app, "tiny-tied:mine").await.expect(200);
    app.until_idle().await;
    let text = app.scrape().await.0;
    assert!(has(&text, &format!("{generated} 30")) && !has(&text, info), "what was counted stays: {text}");

    for name in 0..2100 {
        let name = format!("n{name}");
        register(&app, &named(&app, &name, 1)).await.expect(201);
        remove(&app, &format!("{NAME}:{name}")).await.expect(200);
    }
    register(&app, &named(&app, "last", 1)).await.expect(201);
    says(&app, "last").await;
    app.until_idle().await;
    let scrape = app.scrape().await;
    let series = scrape.0.lines().filter(|l| l.starts_with("lonas_generated_tokens_total{")).count();
    assert!(series <= 2049, "{series} series");
    assert_eq!(scrape.sum("lonas_generated_tokens_total", &[("subnetwork", "other")]), 30.0);
    assert_eq!(scrape.sum("lonas_subnetwork_info", &[]), 6.0, "those that have a label of their own");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_may_come_and_go_at_once_while_others_generate() {
    let app = std::sync::Arc::new(App::with(open_to_admins()));
    let running = app.start(
        COMPLETIONS,
        &json!({"model": NAME, "prompt": "one", "max_tokens": 100, "n": 4, "logit_bias": {(X.to_string()): 100}}),
    );
    let workers = (0..8).map(|worker| {
        let app = app.clone();
        tokio::spawn(async move {
            for turn in 0..10 {
                let name = format!("w{worker}-{turn}");
                register(&app, &named(&app, &name, worker)).await.expect(201);
                // The same genome must say the same, whoever registered it.
                let kept = format!("k{}", worker % 3);
                let body = named(&app, &kept, worker % 3);
                assert!(matches!(register(&app, &body).await.status, 200 | 201));
                app.complete(question(&name)).await;
                remove(&app, &format!("{NAME}:{name}")).await.expect(200);
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.unwrap();
    }
    assert_eq!(running.await.unwrap().expect(200)["usage"]["completion_tokens"], 400);
    let all = app.get(ALL).await.expect(200);
    assert_eq!(all["data"].as_array().unwrap().len(), 9, "three are kept: {all}");
    app.until_idle().await;
}
