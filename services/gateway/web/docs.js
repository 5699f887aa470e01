// The API as it describes itself, shown by Swagger UI.

window.SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  deepLinking: true,
  validatorUrl: null, // else it asks a server of its makers about addresses that others reach
});
