//! Files and sockets: whatever the interface, nobody can have one.
//!
//! A function that can fail says that access is denied, and what lists things lists nothing; the rest ends the guest. The
//! functions are those that the component imports, so no list of them is kept here.

use super::{Stop, streams};
use crate::plugin::sandbox::CallState;
use wasmtime::component::types::{ComponentFunc, ComponentItem};
use wasmtime::component::{Linker, LinkerInstance, Resource, ResourceType, Type, Val};
use wasmtime::{Engine, StoreContextMut};

/// What the interfaces call it when somebody may not do something, the plainest first.
const REFUSALS: [&str; 2] = ["access-denied", "access"];

/// A folder, file or socket that nobody has.
struct Nothing;

/// Defines every resource and function that a component imports as `name`.
pub(super) fn link(
    linker: &mut Linker<CallState>,
    name: &str,
    import: &ComponentItem,
    engine: &Engine,
) -> wasmtime::Result<()> {
    let ComponentItem::ComponentInstance(interface) = import else {
        return Ok(()); // Nothing is defined then, and instantiating fails.
    };
    let mut instance = linker.instance(name)?;
    for (item, export) in interface.exports(engine) {
        match export.ty {
            ComponentItem::ComponentFunc(_) => function(&mut instance, item)?,
            ComponentItem::Resource(_) => {
                let nothing = || ResourceType::host::<Nothing>();
                let ty = streams::resource(item).unwrap_or_else(nothing);
                instance.resource(item, ty, |_, _| Ok(()))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Defines a function that is denied.
pub(super) fn function(
    instance: &mut LinkerInstance<'_, CallState>,
    name: &str,
) -> wasmtime::Result<()> {
    let called = name.to_owned();
    instance.func_new(name, move |mut store, ty, arguments, results| {
        store.data().clock.check()?;
        // A handle that was lent must be given back before the call ends.
        for argument in arguments {
            if let Val::Resource(lent) = argument {
                lent.resource_drop(&mut store)?;
            }
        }
        let answer = answer(&mut store, &ty)?;
        match (answer, results) {
            (Some(answer), [result]) => *result = answer,
            _ => return Err(Stop::Denied(called.clone()).into()),
        }
        Ok(())
    })
}

/// The refusal that a function's type has room for.
fn answer(
    store: &mut StoreContextMut<'_, CallState>,
    ty: &ComponentFunc,
) -> wasmtime::Result<Option<Val>> {
    Ok(match ty.results().next() {
        Some(Type::List(_)) => Some(Val::List(Vec::new())),
        Some(Type::Option(_)) => Some(Val::Option(None)),
        Some(Type::Result(result)) => refusal(result.err()),
        // `instance-network` has no way to fail; with what it gives nothing can be done.
        Some(Type::Own(resource)) if resource == ResourceType::host::<Nothing>() => {
            let nothing = Resource::<Nothing>::new_own(0);
            Some(Val::Resource(nothing.try_into_resource_any(store)?))
        }
        _ => None,
    })
}

fn refusal(error: Option<Type>) -> Option<Val> {
    let Some(Type::Enum(codes)) = error else {
        return None;
    };
    let code = REFUSALS
        .into_iter()
        .find(|refusal| codes.names().any(|name| name == *refusal))?;
    Some(Val::Result(Err(Some(Box::new(Val::Enum(code.to_owned()))))))
}
