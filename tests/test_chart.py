"""The Helm chart: what it makes of its values, and that Kubernetes would take it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

import actors  # noqa: F401  declares the queues
import runtime
from sandbox.fleet import read_procfile
from settings import Settings
from settings_sources import NEEDED_BY, is_secret

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "docker" / "helm" / "mailfleet"
OLDEST, NEWEST = "1.27", "1.37"


def closed(optional: dict[str, Any] | None = None, **required: Any) -> dict[str, Any]:
    """Return the schema of an object that has these fields and no others."""
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
SOME_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
KEY = closed(name=TEXT, key=TEXT)
#: Of kinds that are not Kubernetes' own: their groups and versions, and the fields that the chart sets, as the pages of
#: KEDA and the Prometheus operator have them. Not their definitions themselves, which have many more.
FOREIGN = {
    "TriggerAuthentication": (
        "keda.sh/v1alpha1",
        closed(secretTargetRef={"type": "array", "items": closed(parameter={"const": "host"}, name=TEXT, key=TEXT)}),
    ),
    "ScaledObject": (
        "keda.sh/v1alpha1",
        closed(
            scaleTargetRef=closed(name=TEXT),
            minReplicaCount=COUNT,
            maxReplicaCount=COUNT,
            pollingInterval=COUNT,
            fallback=closed(failureThreshold=COUNT, replicas=COUNT),
            advanced=closed(
                horizontalPodAutoscalerConfig=closed(
                    behavior=closed(scaleDown=closed(stabilizationWindowSeconds={"type": "integer", "maximum": 3600}))
                )
            ),
            triggers={
                "type": "array",
                "items": closed(
                    type={"const": "rabbitmq"},
                    # Every value is text, numbers too.
                    metadata=closed(
                        queueName=TEXT, mode={"const": "QueueLength"}, value={"pattern": "^[0-9]+$", **TEXT}
                    ),
                    authenticationRef=closed(name=TEXT),
                ),
            },
        ),
    ),
    "PodMonitor": (
        "monitoring.coreos.com/v1",
        closed(
            selector=closed(matchLabels=SOME_TEXTS),
            podTargetLabels={"type": "array", "items": TEXT},
            podMetricsEndpoints={
                "type": "array",
                "items": closed(
                    {"authorization": closed(credentials=KEY)},
                    port=TEXT,
                    interval={"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                ),
            },
        ),
    ),
}
PROCESS_TYPES = set(read_procfile(ROOT / "Procfile")) - {"release"}

EVERYTHING: dict[str, Any] = {
    "image": {"digest": f"sha256:{'0' * 64}", "pullSecrets": ["registry"]},
    "settings": {
        "MAX_ATTEMPTS": 1_234_567,
        "INTERNAL_DOMAINS": "contoso.com",
        "BACKUP_KEYS_FILE": "/keys/archive",
        "SECRETS_FROM": "vault://vault.example:8200/secret/mailfleet",
        "VAULT_KUBERNETES_ROLE": "mailfleet",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://otel:4318",
    },
    "graphCertificate": {"existingSecret": "graph"},
    "attachments": {"existingClaim": "attachments"},
    "autoscaling": {"by": "queue"},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "consoleToken": {"existingSecret": "viewer"}},
    "networkPolicy": {
        "consoleFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}],
        "serverPeers": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        "instanceMetadata": True,
    },
    "serviceAccount": {"annotations": {"azure.workload.identity/client-id": "x"}, "vaultAudience": "vault"},
    "podAnnotations": {"a": "b"},
    "podLabels": {"c": "d"},
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "mail", "operator": "Exists"}],
    "extraVolumes": [{"name": "authority", "configMap": {"name": "authority"}}],
    "extraVolumeMounts": [{"name": "authority", "mountPath": "/authority", "readOnly": True}],
    "secretOf": {"BACKUP_KEYS": "archive"},
    "migrations": {"existingSecret": "owner"},
    "processes": {
        "send_plain": {"settings": {"SEND_PLAIN_THREADS": 16}, "existingSecret": "sending"},
        "backup": {
            "wholeSecrets": ["vault-login"],
            "extraVolumes": [{"name": "keys", "secret": {"secretName": "keys"}}],
            "extraVolumeMounts": [{"name": "keys", "mountPath": "/keys", "readOnly": True}],
        },
    },
}
NOTHING: dict[str, Any] = {
    "autoscaling": {"by": "cpu"},
    "migrations": {"enabled": False},
    "networkPolicy": {"enabled": False},
    "disruptionBudgets": {"enabled": False},
}


@pytest.fixture(scope="module")
def chart() -> Iterator[helm_python.Chart]:
    with helm_python.Chart.load(CHART) as loaded:
        yield loaded


def rendered(chart: helm_python.Chart, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    texts = chart.render(values or {}, name="mail", namespace="post")
    documents = [yaml.safe_load_all(text) for path, text in texts.items() if path.endswith(".yaml")]
    return [document for each in documents for document in each if document]


def of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def pods(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the pods' specifications, the migrations' too, by process type."""
    made = [*of_kind(documents, "Deployment").values(), *of_kind(documents, "Job").values()]
    templates = [document["spec"]["template"] for document in made]
    return {each["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"] for each in templates}


def environment(pod: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"] if "value" in entry}


def secrets(pod: dict[str, Any]) -> dict[str, str]:
    """Return the names of the secrets that a pod's variables are from, by variable."""
    given = [entry for entry in pod["containers"][0]["env"] if "value" not in entry]
    references = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in given}
    assert all(reference["key"] == name and reference["optional"] for name, reference in references.items())
    return {name: reference["name"] for name, reference in references.items()}


@pytest.mark.parametrize(
    ("values", "version"),
    [({}, NEWEST), (EVERYTHING, NEWEST), (EVERYTHING, OLDEST), (NOTHING, NEWEST)],
    ids=["defaults", "everything", "everything-oldest", "nothing"],
)
def test_kubernetes_would_take_what_the_chart_makes(
    chart: helm_python.Chart, values: dict[str, Any], version: str
) -> None:
    documents = rendered(chart, values)
    for document in documents:
        if document["kind"] in FOREIGN:
            validate_foreign(document)
        else:
            kubernetes_validate.validate(document, version, strict=True)
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(names) == len(set(names))
    assert all(document["metadata"]["namespace"] == "post" for document in documents)


def validate_foreign(document: dict[str, Any]) -> None:
    version, specification = FOREIGN[document["kind"]]
    whole = closed(
        apiVersion={"const": version},
        kind={},
        metadata=closed(name=TEXT, namespace=TEXT, labels=SOME_TEXTS),
        spec=specification,
    )
    jsonschema.Draft7Validator(whole).validate(document)


def test_an_object_of_another_kind_with_a_field_that_its_kind_has_not_is_found(chart: helm_python.Chart) -> None:
    documents = [document for document in rendered(chart, EVERYTHING) if document["kind"] in FOREIGN]
    assert {document["kind"] for document in documents} == FOREIGN.keys()
    for document in documents:
        with pytest.raises(jsonschema.ValidationError):
            validate_foreign({**document, "spec": {**document["spec"], "minReplicas": 1}})


def test_the_oldest_kubernetes_is_the_one_that_the_chart_asks_for(chart: helm_python.Chart) -> None:
    assert chart.metadata["kubeVersion"] == f">={OLDEST}.0-0"


def test_helm_finds_no_fault_in_the_chart() -> None:
    report = helm_python.lint(CHART, EVERYTHING, strict=True)
    assert [message for message in report["messages"] if message["severity"] > 1] == []


def test_the_chart_has_a_deployment_for_each_process_type_of_the_procfile(chart: helm_python.Chart) -> None:
    documents = rendered(chart)
    assert set(pods(documents)) == PROCESS_TYPES | {"release"}
    for name, pod in pods(documents).items():
        assert pod["containers"][0]["args"] == [name]
        assert "command" not in pod["containers"][0]


def test_every_pod_is_restricted_and_gets_time_to_end(chart: helm_python.Chart) -> None:
    for name, pod in pods(rendered(chart, EVERYTHING)).items():
        [container] = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["automountServiceAccountToken"] is False
        assert container["resources"]["limits"]["memory"]
        if name != "release":
            assert pod["terminationGracePeriodSeconds"] >= 20
            probes = [container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
            # None looks at the servers, the console's neither: it is needed most when one of them is away.
            assert {probe["httpGet"]["path"] for probe in probes} <= {"/metrics", "/healthz"}
            assert pod["topologySpreadConstraints"]


def test_migrations_run_before_installation_and_upgrade_and_need_nothing_of_the_release(
    chart: helm_python.Chart,
) -> None:
    documents = rendered(chart, EVERYTHING)
    [job] = of_kind(documents, "Job").values()
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    account = of_kind(documents, "ServiceAccount")[job["spec"]["template"]["spec"]["serviceAccountName"]]["metadata"]
    assert account["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert int(account["annotations"]["helm.sh/hook-weight"]) < int(
        job["metadata"]["annotations"]["helm.sh/hook-weight"]
    )
    assert account["annotations"]["azure.workload.identity/client-id"] == "x"
    assert "ConfigMap" not in {document["kind"] for document in documents}


def test_every_pod_runs_as_an_account_that_is_there(chart: helm_python.Chart) -> None:
    documents = rendered(chart)
    used = {pod["serviceAccountName"] for pod in pods(documents).values()}
    assert used == set(of_kind(documents, "ServiceAccount")) == {"mail-mailfleet", "mail-mailfleet-release"}
    assert all(
        account["automountServiceAccountToken"] is False for account in of_kind(documents, "ServiceAccount").values()
    )
    given = rendered(chart, {"serviceAccount": {"existing": "sending"}})
    assert {pod["serviceAccountName"] for pod in pods(given).values()} == {"sending"}
    assert not of_kind(given, "ServiceAccount")


def test_a_pod_has_a_token_only_to_log_in_to_vault_with(chart: helm_python.Chart) -> None:
    assert not any(tokens(pod) for pod in pods(rendered(chart)).values())
    for pod in pods(rendered(chart, EVERYTHING)).values():
        assert tokens(pod) == [{"path": "token", "expirationSeconds": 3600, "audience": "vault"}]
        [mount] = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "vault-token"]
        assert environment(pod)["VAULT_KUBERNETES_TOKEN_PATH"] == f"{mount['mountPath']}/token"
    [backup] = [
        name
        for name, pod in pods(
            rendered(chart, {"processes": {"backup": {"settings": {"VAULT_KUBERNETES_ROLE": "archive"}}}})
        ).items()
        if tokens(pod)
    ]
    assert backup == "backup"
    elsewhere = {"VAULT_KUBERNETES_ROLE": "mailfleet", "VAULT_KUBERNETES_TOKEN_PATH": "/mine/token"}
    for pod in pods(rendered(chart, {"settings": elsewhere})).values():
        assert (tokens(pod), environment(pod)["VAULT_KUBERNETES_TOKEN_PATH"]) == ([], "/mine/token")


def tokens(pod: dict[str, Any]) -> list[dict[str, Any]]:
    projected = [volume["projected"]["sources"] for volume in pod["volumes"] if "projected" in volume]
    return [source["serviceAccountToken"] for sources in projected for source in sources]


def test_the_chart_makes_no_secret_and_a_value_that_is_one_is_refused(chart: helm_python.Chart) -> None:
    assert not of_kind(rendered(chart, EVERYTHING), "Secret")
    for name in (str(field.validation_alias) for field in Settings.model_fields.values() if is_secret(field)):
        with pytest.raises(helm_python.HelmError, match=name):
            rendered(chart, {"settings": {name: "hunter2"}})


@pytest.mark.parametrize(
    "values",
    [
        {"replicaCount": 3},
        {"processes": {"send-plain": {"replicas": 1, "resources": {}}}},
        {"autoscaling": {"by": "moon"}},
        {"terminationGracePeriodSeconds": 5},
        {"existingSecret": ""},
        {"existingSecrets": ["mailfleet"]},
        {"secretOf": {"BACKUP_KEY": "archive"}},
        {"extraVolumes": [{"name": "keys", "secret": {"secretName": "keys"}}]},
        {"extraVolumes": [{"name": "keys", "projected": {"sources": [{"secret": {"name": "keys"}}]}}]},
        {"settings": {"max_attempts": 3}},
    ],
)
def test_values_that_mean_nothing_are_refused(chart: helm_python.Chart, values: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmError):
        rendered(chart, values)


def test_settings_and_secrets_reach_the_processes_that_they_are_for(chart: helm_python.Chart) -> None:
    by_type = pods(rendered(chart, EVERYTHING))
    for name, pod in by_type.items():
        assert environment(pod)["MAX_ATTEMPTS"] == "1234567"
        assert environment(pod)["METRICS_PORT"] == "9191"
        has_certificate = name in {"send_plain", "send_attached", "backup", "maintenance"}
        expected = "/etc/mailfleet/graph/certificate.pem" if has_certificate else None
        assert environment(pod).get("GRAPH_CLIENT_CERTIFICATE") == expected
        assert ("SEND_PLAIN_THREADS" in environment(pod)) == (name == "send_plain")
        assert secrets(pod)["DATABASE_URL"] == {"send_plain": "sending", "release": "owner"}.get(name, "mailfleet")
        assert secrets(pod).get("BACKUP_KEYS", "archive") == "archive"
        whole = [entry["secretRef"]["name"] for entry in pod["containers"][0].get("envFrom", [])]
        assert whole == (["vault-login"] if name == "backup" else [])


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_a_pod_is_given_the_secrets_that_its_process_type_needs_and_no_other(
    chart: helm_python.Chart, values: dict[str, Any]
) -> None:
    processes = {"ingest": {"replicas": 1, "resources": {"limits": {"memory": "1Gi"}}}, **values.get("processes", {})}
    for name, pod in pods(rendered(chart, {**values, "processes": processes})).items():
        assert set(secrets(pod)) == {"DATABASE_URL"} | {
            variable
            for variable, types in NEEDED_BY.items()
            if name in types and variable != "GRAPH_CLIENT_CERTIFICATE"
        }
        mounted = {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
        expected = {"graph"} if values and name in NEEDED_BY["GRAPH_CLIENT_CERTIFICATE"] else set()
        assert mounted == expected | ({"keys"} if values and name == "backup" else set())


def test_every_secret_may_be_in_a_secret_of_its_own(chart: helm_python.Chart) -> None:
    others = {"DATABASE_URL", *NEEDED_BY} - {"GRAPH_CLIENT_CERTIFICATE"}
    by_type = pods(rendered(chart, {"secretOf": {name: name.lower().replace("_", "-") for name in others}}))
    given = {name: secret for pod in by_type.values() for name, secret in secrets(pod).items()}
    assert given == {name: name.lower().replace("_", "-") for name in others}


def test_where_a_store_gives_every_secret_kubernetes_has_none(chart: helm_python.Chart) -> None:
    documents = rendered(chart, {"settings": VAULT, "existingSecret": ""})
    for document in documents:
        kubernetes_validate.validate(document, NEWEST, strict=True)
    assert not any("envFrom" in pod["containers"][0] or secrets(pod) for pod in pods(documents).values())


def test_every_mount_has_its_volume(chart: helm_python.Chart) -> None:
    for name, pod in pods(rendered(chart, EVERYTHING)).items():
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        graph = {"graph-certificate"} if name in {"send_plain", "send_attached", "backup", "maintenance"} else set()
        keys = {"keys"} if name == "backup" else set()
        assert mounted == {"tmp", "attachments", "authority", "vault-token"} | graph | keys


def test_scaling_follows_queues_that_exist_and_leaves_the_number_of_replicas_alone(chart: helm_python.Chart) -> None:
    documents = rendered(chart, {"autoscaling": {"by": "queue"}})
    deployments = of_kind(documents, "Deployment")
    scaled = of_kind(documents, "ScaledObject")
    assert set(scaled) == {f"mail-mailfleet-{name}" for name in ("bridge", "send-plain", "send-attached", "backup")}
    for name, document in scaled.items():
        specification = document["spec"]
        assert specification["scaleTargetRef"] == {"name": name}
        assert "replicas" not in deployments[name]["spec"]
        assert specification["minReplicaCount"] <= specification["fallback"]["replicas"]
        [trigger] = specification["triggers"]
        assert trigger["metadata"]["queueName"] in {*runtime.fleet_broker.queues, runtime.SEND_QUEUE}
        assert trigger["authenticationRef"]["name"] in of_kind(documents, "TriggerAuthentication")
    assert not of_kind(documents, "HorizontalPodAutoscaler")


def test_without_keda_the_same_types_are_scaled_by_cpu(chart: helm_python.Chart) -> None:
    queue, cpu = (rendered(chart, {"autoscaling": {"by": by}}) for by in ("queue", "cpu"))
    assert set(of_kind(cpu, "HorizontalPodAutoscaler")) == set(of_kind(queue, "ScaledObject"))
    assert not {document["kind"] for document in cpu} & FOREIGN.keys()
    for name, autoscaler in of_kind(cpu, "HorizontalPodAutoscaler").items():
        assert autoscaler["spec"]["scaleTargetRef"]["name"] == name in of_kind(cpu, "Deployment")


def test_a_disruption_takes_one_replica_at_a_time_and_a_single_one_does_not_hold_up_a_node(
    chart: helm_python.Chart,
) -> None:
    documents = rendered(chart)
    several = {name for name, each in of_kind(documents, "Deployment").items() if each["spec"]["replicas"] > 1}
    assert set(of_kind(documents, "PodDisruptionBudget")) == several
    alone = rendered(chart, {"processes": {name: {"replicas": 1} for name in PROCESS_TYPES}})
    assert not of_kind(alone, "PodDisruptionBudget")


def test_pods_are_closed_but_for_metrics_and_the_console(chart: helm_python.Chart) -> None:
    policies = of_kind(rendered(chart), "NetworkPolicy")
    every, console = policies["mail-mailfleet"]["spec"], policies["mail-mailfleet-console"]["spec"]
    assert every["policyTypes"] == ["Ingress", "Egress"]
    assert "app.kubernetes.io/component" not in every["podSelector"]["matchLabels"]
    assert [rule["ports"] for rule in every["ingress"]] == [[{"protocol": "TCP", "port": 9191}]]
    assert [rule["ports"] for rule in console["ingress"]] == [[{"protocol": "TCP", "port": 8000}]]
    assert all(rule["from"] == [{"podSelector": {}}] for rule in [*every["ingress"], *console["ingress"]])


PROMETHEUS = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


@pytest.mark.parametrize("token", ["", "viewer"])
def test_who_collects_the_fleets_own_metrics_reaches_the_port_that_they_are_asked_for_on(
    chart: helm_python.Chart, token: str
) -> None:
    documents = rendered(
        chart,
        {
            "podMonitor": {"enabled": True, "consoleToken": {"existingSecret": token}},
            "networkPolicy": {"metricsFrom": PROMETHEUS, "consoleFrom": [{"podSelector": {"matchLabels": {"a": "b"}}}]},
        },
    )
    [monitor] = of_kind(documents, "PodMonitor").values()
    asked = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    rules = [rule for each in of_kind(documents, "NetworkPolicy").values() for rule in each["spec"]["ingress"]]
    reached = {port["port"] for rule in rules if rule["from"] == PROMETHEUS for port in rule["ports"]}
    assert reached == {{"metrics": 9191, "http": 8000}[name] for name in asked}
    assert [8000] in [[port["port"] for port in rule["ports"]] for rule in rules if rule["from"] != PROMETHEUS]


SERVERS, HTTPS, METADATA = {5432, 5671, 5672, 6379}, {443}, {80}
VAULT = {"SECRETS_FROM": "vault://vault.example:8200/secret/mailfleet"}
AZURE = {"SECRETS_FROM": "azure-key-vault://name.vault.azure.net"}


@pytest.mark.parametrize(
    ("values", "servers", "metadata"),
    [
        ({}, set(), False),
        ({"settings": VAULT}, {8200}, False),
        ({"processes": {"backup": {"settings": VAULT}}}, {8200}, False),
        ({"migrations": {"settings": VAULT}}, {8200}, False),
        ({"settings": {"SECRETS_FROM": "vault://vault.example/secret/mailfleet"}}, {443}, False),
        ({"settings": {"SECRETS_FROM": "vault+http://localhost:8100/secret/mailfleet"}}, set(), False),
        ({"settings": {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://otel:4318"}}, {4318}, False),
        ({"settings": {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://otel.example/v1/traces"}}, {443}, False),
        ({"settings": AZURE}, set(), True),
        ({"settings": AZURE, "podLabels": {"azure.workload.identity/use": "true"}}, set(), False),
        ({"networkPolicy": {"instanceMetadata": True}}, set(), True),
    ],
)
def test_pods_reach_what_the_settings_name_and_nothing_else(
    chart: helm_python.Chart, values: dict[str, Any], servers: set[int], metadata: bool
) -> None:
    rules = of_kind(rendered(chart, values), "NetworkPolicy")["mail-mailfleet"]["spec"]["egress"]
    reached = [{port["port"] for port in rule["ports"]} for rule in rules]
    assert reached == [{53}, SERVERS | servers, HTTPS, *([METADATA] if metadata else [])]
    if metadata:
        assert [peer["ipBlock"]["cidr"] for peer in rules[-1]["to"]] == ["169.254.169.254/32", "169.254.170.23/32"]


def test_the_fleets_own_metrics_are_collected_with_a_viewers_token_only(chart: helm_python.Chart) -> None:
    [monitor] = of_kind(rendered(chart, EVERYTHING), "PodMonitor").values()
    own, fleet = monitor["spec"]["podMetricsEndpoints"]
    assert own["port"] == "metrics"
    assert fleet["authorization"]["credentials"] == {"name": "viewer", "key": "token"}
    [plain] = of_kind(rendered(chart, {"podMonitor": {"enabled": True}}), "PodMonitor").values()
    assert [endpoint["port"] for endpoint in plain["spec"]["podMetricsEndpoints"]] == ["metrics"]


def test_the_notes_name_what_the_chart_has_made(chart: helm_python.Chart) -> None:
    [notes] = [text for path, text in chart.render({}, name="mail", namespace="post").items() if "NOTES" in path]
    documents = rendered(chart)
    assert set(re.findall(r"deploy/(\S+)", notes)) <= set(of_kind(documents, "Deployment"))
    assert set(re.findall(r"svc/(\S+)", notes)) <= set(of_kind(documents, "Service"))


def test_the_deployment_guide_names_only_values_that_the_chart_has(chart: helm_python.Chart) -> None:
    table = (ROOT / "docs" / "deploy.md").read_text().partition("## Kubernetes with Helm")[2].partition("## Scaling")[0]
    named = set(re.findall(r"`([a-zA-Z]+(?:\.[A-Za-z_]+)*)[`=]", table))
    paths = {name for name in named if name.partition(".")[0] in chart.values}
    assert len(paths) > 10
    for path in paths:
        step: Any = chart.schema
        for name in path.replace("TYPE", "bridge").split("."):
            step = definition(chart, step)
            assert name in step["properties"] or re.match(step.get("propertyNames", {}).get("pattern", "$"), name), path
            step = step["properties"].get(name, {})


def definition(chart: helm_python.Chart, schema: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference and say what properties there are, if they are listed."""
    assert chart.schema
    found = chart.schema["definitions"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return {"properties": {}, **found}
