"use strict";
// Shows the schema as it stands. Text is set as text: nothing of it becomes markup.

function element(name, ...content) {
  const made = document.createElement(name);
  made.append(...content);
  return made;
}

function resolved(schema, all) {
  const name = schema?.$ref?.split("/").pop();
  return name ? all[name] : schema;
}

function typeOf(schema, all) {
  const plain = resolved(schema, all) ?? {};
  if (plain.anyOf) return plain.anyOf.map((each) => typeOf(each, all)).join(" or ");
  if (plain.enum) return plain.enum.join(" | ");
  if (plain.type === "array") return `list of ${typeOf(plain.items, all)}`;
  return schema?.$ref ? schema.$ref.split("/").pop() : (plain.format ?? plain.type ?? "any");
}

function rows(entries) {
  return element("table", ...entries.map((cells) => element("tr", ...cells.map((cell) => element("td", cell)))));
}

function fields(schema, all) {
  const plain = resolved(schema, all);
  if (plain?.type === "array") return fields(plain.items, all);
  return Object.entries(plain?.properties ?? {}).map(([name, each]) => [
    element("code", name),
    typeOf(each, all),
    each.description ?? "",
  ]);
}

function shown(path, method, operation, all) {
  const sections = [element("p", operation.description ?? "")];
  if (operation.parameters?.length) {
    sections.push(element("h3", "Parameters"));
    sections.push(rows(operation.parameters.map((each) => [
      element("code", each.name), each.in, typeOf(each.schema, all), each.description ?? each.schema.description ?? "",
    ])));
  }
  for (const [title, part] of [["Body", operation.requestBody], ["Answer", operation.responses["200"]]]) {
    const schema = part?.content?.["application/json"]?.schema;
    if (schema) sections.push(element("h3", `${title}: ${typeOf(schema, all)}`), rows(fields(schema, all)));
  }
  const data = operation.requestBody ? " --json '{…}'" : "";
  const curl = `curl -H "Authorization: Bearer $TOKEN" -X ${method.toUpperCase()}${data} ${location.origin}${path}`;
  sections.push(element("pre", curl));
  const verb = element("span", method.toUpperCase());
  verb.className = "method";
  return element("details", element("summary", verb, element("code", path)), ...sections);
}

function show(schema) {
  const all = schema.components?.schemas ?? {};
  const place = document.getElementById("operations");
  place.replaceChildren(element("p", schema.info.description ?? ""));
  const groups = new Map();
  for (const [path, methods] of Object.entries(schema.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags?.[0] ?? "health";
      groups.set(tag, [...(groups.get(tag) ?? []), shown(path, method, operation, all)]);
    }
  }
  for (const [tag, operations] of groups) place.append(element("h2", tag), ...operations);
}

function complain(text) {
  document.getElementById("problem").textContent = text;
}

async function load() {
  const token = document.getElementById("token").value;
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch("openapi.json", { headers });
  const told = await answer.json();
  complain(answer.ok ? "" : told.detail);
  if (answer.ok) show(told);
}

document.getElementById("access").addEventListener("submit", (event) => {
  event.preventDefault();
  load().catch(() => complain("The console does not answer."));
});
